"""Iterations that bring nothing: retried with their cause, and ended when they go on."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from rich.console import Console

from mara_rl.display import Display
from mara_rl.errors import RetryableError
from mara_rl.training import ppo_phase
from mara_rl.training.checkpoint import TrainState, load_newest_checkpoint
from mara_rl.training.config import load_config
from mara_rl.training.ppo_phase import PPOPhase
from mara_rl.training.run_folder import RunFolder
from services.prompt_epochs import QueuePosition


class FakeAlgorithm:
    """Each call of `train` raises or returns the next outcome; the last one for ever."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.env_runner_group = SimpleNamespace(num_healthy_remote_workers=lambda: 0)

    def train(self) -> dict[str, Any]:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def phase_of(algorithm: FakeAlgorithm, out: io.StringIO) -> PPOPhase:
    config = load_config("quickstart", ["ppo.no_progress_timeout_s=0.3"])
    unused: Any = None
    return PPOPhase(
        config,
        folder=unused,
        algorithm=algorithm,
        weights=unused,
        runners=SimpleNamespace(last_failures=list),
        queue=unused,
        redis_url="redis://localhost",
        tracking=unused,
        state=TrainState(iteration=4),
        display=Display(Console(file=out)),
    )


def test_no_progress_names_the_cause_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_phase, "_RETRY_WAIT_S", 0.05)
    out = io.StringIO()
    phase = phase_of(FakeAlgorithm(RetryableError("Redis is away"), {}), out)
    saved = []
    monkeypatch.setattr(phase, "save", lambda: saved.append(4))
    with pytest.raises(RetryableError, match=r"no update for 0.3 s .*; checkpoint 4 is saved"):
        phase.run(check_interrupt=lambda: None)
    assert saved == [4]
    lines = [line for line in out.getvalue().splitlines() if line.startswith("iteration 5")]
    assert len(lines) > 1
    assert all("0 of 1 runners alive: Redis is away" in line for line in lines)


def test_an_interrupt_is_heard_while_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phase_of(FakeAlgorithm({}), io.StringIO()).run(check_interrupt=interrupt)


class FlakyQueue:
    """A queue whose Redis is away on the first call."""

    def __init__(self) -> None:
        self.calls = 0
        self.acknowledged: list[list[str]] = []

    def position(self) -> QueuePosition | None:
        self.calls += 1
        if self.calls == 1:
            raise redis.ConnectionError("gone")
        return None

    def delivered(self) -> list[str]:
        return ["entry"]

    def ack_delivered(self, entry_ids: list[str]) -> None:
        self.acknowledged.append(entry_ids)


def test_a_checkpoint_without_redis_is_made_up_for_and_then_not_repeated(tmp_path: Path) -> None:
    out = io.StringIO()
    phase = phase_of(FakeAlgorithm({}), out)
    queue = FlakyQueue()
    phase._queue = queue
    phase._folder = RunFolder(tmp_path)
    phase._weights = SimpleNamespace(state=lambda: {"w": np.zeros(2)})
    phase._runners = SimpleNamespace(barrier=lambda iteration: None)
    phase.save()
    assert load_newest_checkpoint(tmp_path / "checkpoints") is not None
    assert queue.acknowledged == []
    assert out.getvalue().startswith("checkpoint 4: ")
    phase.save()
    phase.save()  # nothing was learned since
    assert queue.acknowledged == [["entry"]]
