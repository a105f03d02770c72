"""Everything a run stands on, opened in order and closed again: Ray, Redis, scores, MLflow."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from mara_rl.errors import ConfigError
from mara_rl.tracking.store import tracking_uri
from mara_rl.training.config import TrainConfig
from services.prompt_source import PromptSourceConfig
from services.ray_session import check_resources, ray_session
from services.redis_server import redis_url
from services.score_client import ScoreClientConfig
from services.score_service import ScoreServiceConfig, deploy_scores


@dataclass(frozen=True)
class Session:
    """The addresses a run needs."""

    prompts: PromptSourceConfig
    scores: ScoreClientConfig
    tracking_uri: str


@contextlib.contextmanager
def training_session(config: TrainConfig, *, single_node: bool) -> Iterator[Session]:
    """Open the services of a run; embedded ones only where this process started Ray itself.

    Raises ConfigError naming what is missing before anything heavy starts: the resource plan is
    checked against the cluster first.
    """
    with ray_session() as ray:
        alone = ray.owns_cluster or single_node
        if not alone and "MARA_HOME" not in os.environ:
            raise ConfigError(
                "MARA_HOME is not set: on a cluster it must name a folder that every node shares "
                "(--single-node says that there is one node only)"
            )
        check_resources(resource_plan(config))
        with redis_url(allow_embedded=alone) as url:
            uri = tracking_uri(allow_local=alone)
            services = {
                name: ScoreServiceConfig(**score.model_dump(exclude={"weight"}))
                for name, score in config.scores.items()
            }
            deploy_scores(services, ready_timeout_s=config.rollouts.placement_timeout_s)
            yield Session(
                prompts=PromptSourceConfig(
                    url=url,
                    seed=config.seed,
                    deadline_s=config.prompts.read_timeout_s,
                    max_failures=config.prompts.max_failures,
                    dead_after_s=config.prompts.dead_after_s,
                    heartbeat_s=config.prompts.dead_after_s / 12,
                    prefetch=config.rollouts.num_slots,
                ),
                scores=ScoreClientConfig(
                    apps={name: name for name in config.scores},
                    deadline_s=config.scoring.deadline_s,
                    max_attempts=config.scoring.max_attempts,
                ),
                tracking_uri=uri,
            )


def resource_plan(config: TrainConfig) -> list[tuple[str, dict[str, float]]]:
    """Every actor of a run with the resources it asks for."""
    plan = [
        (name, score.bundle)
        for name, score in config.scores.items()
        for _ in range(score.num_replicas)
    ]
    rollouts, learner = config.rollouts, config.learner
    plan += [("runners", _bundle(rollouts.num_cpus, rollouts.num_gpus))] * rollouts.num_runners
    plan += [("learners", _bundle(learner.num_cpus, learner.num_gpus))] * learner.num_learners
    return plan


def _bundle(num_cpus: float, num_gpus: float) -> dict[str, float]:
    bundle = {"CPU": num_cpus, "GPU": num_gpus}
    return {resource: amount for resource, amount in bundle.items() if amount}
