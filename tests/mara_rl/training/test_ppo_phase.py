"""Iterations that bring nothing: retried with their cause, and ended when they go on."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from ray.exceptions import ActorDiedError
from rich.console import Console

from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.training import ppo_phase
from mara_rl.training.config import load_config
from mara_rl.training.faults.fault_report import Faults
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.ppo_phase import PPOPhase
from mara_rl.training.rllib.learners import Learners
from mara_rl.training.rllib.workers import Workers
from mara_rl.training.run.checkpoint import TrainState, load_newest_checkpoint
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.run_folder import RunFolder
from mara_rl.training.run.run_queue import RunQueue
from services.prompt_queue.prompt_epochs import QueuePosition
from services.prompt_queue.prompt_queue import QueueLost


class LocalLearner:
    """A learner in this process, as RLlib's group of them shows it."""

    def __len__(self) -> int:
        return 0

    def foreach_learner(self, call: Any) -> None:
        """It answers."""


class FakeAlgorithm:
    """Each call of `train` raises or returns the next outcome; the last one for ever."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.learner_group = LocalLearner()

    def train(self) -> dict[str, Any]:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def away() -> None:
    raise redis.ConnectionError("gone")


class FakeRunners:
    """Rollout actors, all dead, in which `faults` happened."""

    num_alive = num_restarts = num_dropped_samples = 0

    def __init__(self, *faults: Faults, failures: Sequence[str] = ()) -> None:
        self._faults = list(faults)
        self._failures = list(failures)
        self.replaced = 0

    def take_faults(self) -> Faults:
        return self._faults.pop(0)

    def last_failures(self) -> list[str]:
        return self._failures

    def replace_silent(self) -> list[int]:
        self.replaced += 1
        return [2]

    def restart(self, iteration: int) -> None:
        """They abandon nothing."""


class QuietQueue:
    """A queue that is there."""

    def __init__(self) -> None:
        self.remembered: tuple[list[str], int] | None = None
        self.marked: list[tuple[list[str], str]] = []
        self.lost_replies = 0

    def mark_delivered(self, entry_ids: list[str], batch: str) -> None:
        self.marked.append((entry_ids, batch))
        if self.lost_replies:
            self.lost_replies -= 1
            away()

    def check_present(self) -> None:
        """It is."""

    def seen(self) -> list[str]:
        return ["0 0 p1"]

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(waiting=1, dead=0, duplicates=7)

    def remember(self, seen: list[str], duplicates: int) -> None:
        self.remembered = (seen, duplicates)


def phase_of(
    algorithm: FakeAlgorithm,
    out: io.StringIO,
    *,
    queue: Any = None,
    runners: FakeRunners | None = None,
    folder: Any = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> PPOPhase:
    config = load_config("quickstart", ["ppo.no_progress_timeout_s=0.3", "ppo.iterations=6"])
    display = Display(Console(file=out))
    unused: Any = None
    source: Any = SimpleNamespace(url="redis://localhost")
    tracking: Any = SimpleNamespace(unsent=[], logged=[])
    tracking.log_metrics = lambda figures, step: tracking.logged.append(figures)
    run = RunContext(
        config, folder, unused, unused, unused, tracking, display, check_interrupt=check_interrupt
    )
    learners = Learners(algorithm, unused, config, unused)
    workers: Any = Workers(algorithm, learners, runners or FakeRunners())  # type: ignore[arg-type]
    run_queue = RunQueue(queue or QuietQueue(), source, display)
    return PPOPhase(run, workers, run_queue, TrainState(iteration=4))


def test_no_progress_names_the_cause_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_phase, "_RETRY_WAIT_S", 0.05)
    out = io.StringIO()
    queue = QuietQueue()
    monkeypatch.setattr(queue, "check_present", away)
    phase = phase_of(FakeAlgorithm({}), out, queue=queue)
    saved = []
    monkeypatch.setattr(phase, "save", lambda: saved.append(4))
    with pytest.raises(RetryableError, match=r"no update for 0.3 s .*; checkpoint 4 is saved"):
        phase.run()
    assert saved == [4]
    lines = [line for line in out.getvalue().splitlines() if line.startswith("iteration 5")]
    assert len(lines) > 1
    assert all("0 of 1 runners alive: Redis at redis://localhost cannot" in line for line in lines)


def update(rows: int, entry_ids: Sequence[str] = ()) -> dict[str, Any]:
    """What RLlib says of an iteration; ``rows`` were trained on since the start."""
    names = ("answers", "response_tokens", "prefill_tokens", "decisions", "forced_steps")
    policy = ("entropy", "vf_loss", "policy_loss", "gradients_default_optimizer_global_norm")
    updates = ("rows", "kl_sum", "kl_decisions", "explained_variance")
    return {
        "env_runners": {
            "mara": {**dict.fromkeys(names, 1.0), "entry_ids": list(entry_ids)},
            "num_env_steps_sampled": 100,
        },
        "learners": {
            "__all_modules__": {"num_module_steps_trained_lifetime": rows},
            "mara": dict.fromkeys(updates, 1.0),
            "default_policy": dict.fromkeys(policy, 0.0),
        },
        "timers": {"env_runner_sampling_timer": 1.0, "learner_update_timer": 1.0},
    }


def test_faults_of_iterations_without_an_update_count_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ppo_phase, "_RETRY_WAIT_S", 0.0)
    out = io.StringIO()
    outcomes = [{}, {}, update(rows=7), update(rows=9)]
    cause = "score 'cost' from app 'cost': ActorDiedError"
    failures = frozenset(["no answer within 2 s", "not finite"])
    faults = Faults(4, 3, failures, frozenset([cause])), Faults()
    runners = FakeRunners(*faults, failures=["no answer within 2 s"])
    phase = phase_of(FakeAlgorithm(*outcomes), out, runners=runners)
    monkeypatch.setattr(phase, "save", lambda: None)
    phase.run()
    names = "rollout/failed_answers", "rollout/scoring_retries", "faults/attempts_without_update"
    logged = phase._run.tracking.logged  # type: ignore[attr-defined]
    assert [[figures[name] for name in names] for figures in logged] == [
        [4, 3, 2],
        [0, 0, 0],
    ]
    lines = out.getvalue()
    assert (
        "iteration 5: 4 answers failed and were not trained on: no answer within 2 s; not finite"
        in lines
    )
    assert f"iteration 5: scores were asked for again 3 times: {cause}" in lines
    assert lines.count("asked for again") == 1


def test_an_interrupt_is_heard_while_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phase_of(FakeAlgorithm({}), io.StringIO(), check_interrupt=interrupt).run()


def test_a_dead_learner_and_a_failed_one_send_the_run_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise LostPart("the learner is gone")

    phase = phase_of(FakeAlgorithm({}), io.StringIO())
    monkeypatch.setattr(phase._workers.learners, "check", gone)
    with pytest.raises(LostPart, match="the learner is gone"):
        phase.run()
    phase = phase_of(FakeAlgorithm(ActorDiedError()), io.StringIO())
    with pytest.raises(LostPart, match="the learner failed: "):
        phase.run()


def test_actors_that_bring_no_sample_in_time_are_replaced_each_time() -> None:
    out = io.StringIO()
    runners = FakeRunners()
    phase = phase_of(FakeAlgorithm({}), out, runners=runners)
    for dropped in (0, 1, 1, 2):
        runners.num_dropped_samples = dropped
        phase._iterate()
    assert runners.replaced == 2
    assert out.getvalue().count("rollout actor 2 gave no sample for 1800 s") == 2


def test_a_lost_queue_sends_the_run_back_with_what_tells_duplicates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = QuietQueue()
    phase = phase_of(FakeAlgorithm({}), io.StringIO(), queue=queue)
    phase._queue_figures()

    def lost() -> None:
        raise QueueLost("queue 'x' is missing from Redis")

    monkeypatch.setattr(queue, "check_present", lost)
    with pytest.raises(LostPart, match="queue 'x' is missing from Redis"):
        phase.run()
    assert queue.remembered == (["0 0 p1"], 7)


def test_what_was_learned_from_while_redis_was_away_is_marked_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the reply was lost: the same batch is then no duplicate."""
    queue = QuietQueue()
    outcomes = [update(rows, entry_ids=[f"{rows}-0"]) for rows in (7, 9)]
    runners = FakeRunners(Faults(), Faults())
    out = io.StringIO()
    phase = phase_of(FakeAlgorithm(*outcomes), out, queue=queue, runners=runners)
    monkeypatch.setattr(phase, "save", lambda: None)
    queue.lost_replies = 1
    phase.run()
    assert [entry_ids for entry_ids, _ in queue.marked] == [["7-0"], ["7-0"], ["9-0"]]
    first, again, second = (batch for _, batch in queue.marked)
    assert first == again != second
    assert "iteration 5: Redis at redis://localhost cannot serve" in out.getvalue()


class FlakyQueue:
    """A queue whose Redis is away on the first call, and on the first acknowledgement."""

    def __init__(self) -> None:
        self.calls = self.acks = 0
        self.acknowledged: list[list[str]] = []

    def position(self) -> QueuePosition | None:
        self.calls += 1
        if self.calls == 1:
            raise redis.ConnectionError("gone")
        return None

    def delivered(self) -> list[str]:
        return ["entry"]

    def ack_delivered(self, entry_ids: list[str]) -> None:
        self.acks += 1
        if self.acks == 1:
            away()
        self.acknowledged.append(entry_ids)


def test_a_checkpoint_without_redis_is_made_up_for_and_then_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    queue = FlakyQueue()
    phase = phase_of(FakeAlgorithm({}), out, queue=queue, folder=RunFolder(tmp_path))
    learners = phase._workers.learners
    monkeypatch.setattr(learners, "state", lambda: {"w": np.zeros(2)})
    phase.save()
    assert load_newest_checkpoint(tmp_path / "checkpoints") is not None
    assert queue.acknowledged == []
    assert out.getvalue().startswith("checkpoint 4: ")
    phase.save()  # the acknowledgement fails
    assert out.getvalue().count("checkpoint 4: ") == 2
    phase.save()
    phase.save()  # nothing was learned since
    assert queue.acknowledged == [["entry"]]
