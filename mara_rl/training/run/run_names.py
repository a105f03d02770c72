"""Under which names the parts of a run are found outside its folder."""

from mara_rl.training.config import TrainConfig

EXPERIMENT = "mara-rl"
"""The MLflow experiment of all training runs; a run's own name there is that of its folder."""


def queue_name(config: TrainConfig, run: str, mlflow_run_id: str) -> str:
    """The run's prompt queue: of its own unless the config names one, the same once resumed."""
    return config.prompts.queue or f"{run}-{mlflow_run_id[:8]}"


def score_sources(config: TrainConfig, run: str, *, shared_cluster: bool) -> dict[str, str]:
    """What gives each score: a shared application or URL, or the run's own application.

    A cluster of the run's own has one run; on others a run must not replace another's services.
    """
    own = f"{run}-" if shared_cluster else ""
    return {name: score.shared or f"{own}{name}" for name, score in config.scores.items()}
