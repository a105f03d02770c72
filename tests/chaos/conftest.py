"""A run on tiny models whose parts the tests of this folder kill."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from delivery_log import DeliveryLog
from mlflow_servers import MLflowServer
from redis_servers import RedisServer
from training_runs import (
    POISON,
    REWARD_LEVEL,
    TinyModels,
    TrainingProcess,
    iterations,
    metric_history,
    write_config,
)

from services.cluster.redis_server import connect
from services.prompt_queue.prompt_queue import PromptQueue, QueueStatus

PROMPTS = 24
POISONED = "p3"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


class Chaos:
    """A training run with a Redis of its own, which outlives it.

    Attributes:
        prompt_ids: those that can be answered.
        models: what the run is made of.
    """

    def __init__(self, folder: Path, models: TinyModels) -> None:
        self.home = folder / "home"
        self.redis = RedisServer(folder / "redis")
        self.redis.folder.mkdir()
        self.redis.start()
        self.log = DeliveryLog(self.redis.url)
        self.env = {"MARA_REDIS_URL": self.redis.url}
        self.prompt_ids = {f"p{i}" for i in range(PROMPTS)} - {POISONED}
        self.runs: list[TrainingProcess] = []
        self._folder, self.models = folder, models

    def start(self, **sections: Any) -> TrainingProcess:
        """Start a run that goes on until it is ended, with these sections in its config."""
        prompts = [f"Tell me about {i} foxes." for i in range(PROMPTS)]
        prompts[int(POISONED[1:])] += POISON
        sections["ppo"] = {"iterations": 100_000, **sections.get("ppo", {})}
        config = write_config(self._folder, self.models, prompts, **sections)
        return self._run(str(config))

    def resume(self) -> TrainingProcess:
        return self._run("--resume", "tiny-1")

    def _run(self, *arguments: str) -> TrainingProcess:
        self.runs.append(TrainingProcess(self.home, *arguments, env=self.env))
        return self.runs[-1]

    def recovered(self, run: TrainingProcess, at: float, timeout_s: float = 300) -> float:
        """Wait until the run trains again after a fault at the time ``at``: seconds it took.

        The first iteration that ends afterwards may have had its samples before.
        """

        def later() -> list[float]:
            return [ended for _, ended in iterations(self.home) if ended > at]

        run.until(lambda: len(later()) > 1, "training again", timeout_s)
        return later()[1] - at

    def end(self, run: TrainingProcess, fault: str, took_s: float, *, uncounted: int = 0) -> str:
        """Train until epoch 0 has reached the learner whole, stop, check the books; the output.

        ``uncounted``: how many duplicates the queue may have failed to count.
        """
        run.until(lambda: not self.log.lost(self.prompt_ids), "the rest of epoch 0")
        output = run.interrupt()
        status = self.status()
        assert status.duplicates >= self.log.duplicates - uncounted
        print(
            f"| {fault} | {took_s:.1f} | {len(self.log.lost(self.prompt_ids))} "
            f"| {status.duplicates} |"
        )
        self.check_scores()
        return output

    def check_scores(self) -> None:
        """Nothing was learned from a missing score or from one made up."""
        answers = {step: n for step, n, _ in metric_history(self.home, "rollout/answers")}
        rewards = metric_history(self.home, "rollout/score_reward")
        assert rewards
        for step, mean, _ in rewards:  # a single 0 would move it by REWARD_LEVEL / answers
            assert abs(mean - REWARD_LEVEL) < REWARD_LEVEL / answers[step] / 2
        # A reward is Σ weight · score / scale, with the scales of the start in every actor.
        metrics = {
            name: {step: value for step, value, _ in metric_history(self.home, name)}
            for name in ("rollout/reward", "rollout/score_reward", "rollout/score_cost")
        }
        scales = [metric_history(self.home, f"base/scale_{n}")[0][1] for n in ("reward", "cost")]
        for step, reward in metrics["rollout/reward"].items():
            scores = [metrics[f"rollout/score_{n}"][step] for n in ("reward", "cost")]
            assert reward == pytest.approx(scores[0] / scales[0] - scores[1] / scales[1], rel=1e-3)
        steps = [step for step, _ in iterations(self.home)]
        assert steps == list(range(1, len(steps) + 1)), "no step is missing or there twice"

    def queue(self) -> PromptQueue:
        client = connect(self.redis.url)
        names = [key.split("{")[1].split("}")[0] for key in client.keys("mara:*:catalogue")]
        assert len(names) == 1
        return PromptQueue(client, names[0])

    def status(self) -> QueueStatus:
        return self.queue().status()

    def close(self) -> None:
        for run in self.runs:
            run.stop()
        self.log.close()
        self.redis.kill()


@pytest.fixture
def chaos(tmp_path: Path, models: TinyModels) -> Iterator[Chaos]:
    chaos = Chaos(tmp_path, models)
    yield chaos
    chaos.close()


@pytest.fixture
def mlflow_server(chaos: Chaos) -> Iterator[MLflowServer]:
    chaos.home.mkdir()
    server = MLflowServer(chaos.home)  # its database is where the harness looks for one
    server.start()
    yield server
    server.kill()
