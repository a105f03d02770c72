"""Answers come back in the prompts' order, whichever actors fail on the way."""

from types import SimpleNamespace
from typing import Any

import pytest

from mara_rl.common.errors import DataError, RetryableError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.training.config import load_config
from mara_rl.training.faults.fault_report import Faults
from mara_rl.training.rllib import rollout_group
from mara_rl.training.rllib.rollout_group import RolloutGroup

SLOTS = 4


class FakeActors:
    """Actors that answer with the prompt itself; some calls are lost, as RLlib loses them."""

    def __init__(self, lose: set[int], error: Exception | None = None) -> None:
        self.lose = lose
        self.error = error
        self.calls = 0
        self.restored = 0

    def restore_env_runners(self, actors: Any) -> list[int]:
        self.restored += 1
        return [1, 2, 3]

    def healthy_env_runner_ids(self) -> list[int]:
        return [1, 2, 3]

    def foreach_env_runner(self, calls: Any, **kwargs: Any) -> list[Any]:
        if callable(calls):  # a ping
            return [1, 2, 3]
        results = []
        for call in calls:
            self.calls += 1
            if self.calls not in self.lose:
                answers = [DecodedAnswer(p, text=p) for p in call.keywords["prompts"]]
                results.append((call.keywords["place"], self.error or answers, 10))
        return results


def group(actors: FakeActors, *overrides: str) -> RolloutGroup:
    small = [f"rollouts.num_slots={SLOTS}", "ppo.minibatch_size=64"]
    config = load_config("quickstart", [*small, *overrides])
    algorithm = SimpleNamespace(
        env_runner_group=actors,
        learner_group=None,
        restore_env_runners=actors.restore_env_runners,
    )
    return RolloutGroup(algorithm, config)


@pytest.mark.parametrize("lose", [set(), {1}, {2, 3, 5}])
def test_lost_calls_are_asked_again_and_the_order_stays(lose: set[int]) -> None:
    prompts = [f"prompt {i}" for i in range(18)]
    progress: list[int] = []
    actors = group(FakeActors(lose))
    answers = actors.answers(prompts, progress=progress.append)
    assert [a.text for a in answers] == prompts
    assert sum(progress) == len(prompts)
    assert actors.token_forwards == 5 * 10  # one count per chunk, lost calls left out


def test_a_round_that_brings_nothing_is_tried_again_with_the_actors_restored() -> None:
    actors = FakeActors({1, 2, 3})
    answers = group(actors).answers(["a"] * 12)
    assert [a.text for a in answers] == ["a"] * 12
    assert actors.restored == 1


def test_what_fails_again_and_again_is_an_error() -> None:
    with pytest.raises(RetryableError, match="no answers to prompts 1 to 4: 3 times"):
        group(FakeActors(set(range(1, 10)))).answers(["a"] * 12)


class RestartingActor(FakeActors):
    """One actor, which is dead until it was asked for twice."""

    def healthy_env_runner_ids(self) -> list[int]:
        return [1] if self.restored >= 2 else []

    def restore_env_runners(self, actors: Any) -> list[int]:
        super().restore_env_runners(actors)
        return self.healthy_env_runner_ids()


def test_a_lone_actor_that_starts_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_group, "_RETRY_WAIT_S", 0.01)
    actors = RestartingActor(set())
    assert [a.text for a in group(actors).answers(["a"] * 6)] == ["a"] * 6
    assert actors.restored == 2


def test_an_actor_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_group, "_RETRY_WAIT_S", 0.01)
    actors = RestartingActor(set())
    actors.restored = -(10**9)
    with pytest.raises(RetryableError, match=r"no live rollout actor for 0.1 s"):
        group(actors, "rollouts.sample_timeout_s=0.1").answers(["a"])


def test_what_decoding_raised_is_raised_here() -> None:
    with pytest.raises(DataError, match="too long"):
        group(FakeActors(set(), DataError("too long"))).answers(["a"])


class TaskActors(FakeActors):
    """Two actors whose tasks can be looked at."""

    def __init__(self) -> None:
        super().__init__(set())
        self.tasks = [
            SimpleNamespace(
                last_failure="not finite" if failures else "",
                take_failures=failures.pop,
                scorer=SimpleNamespace(take_retries=retries.pop),
            )
            for failures, retries in (
                ([(1, {"not finite"}), (2, {"not finite", "away"})], [(0, "gone"), (3, "gone")]),
                ([(0, set()), (0, set())], [(2, "away"), (1, "late")]),
            )
        ]

    def foreach_env_runner(self, calls: Any, **kwargs: Any) -> list[Any]:
        return [
            calls(SimpleNamespace(env=SimpleNamespace(unwrapped=SimpleNamespace(task=task))))
            for task in self.tasks
        ]


def test_faults_are_taken_from_all_actors() -> None:
    actors = TaskActors()
    assert group(actors).take_faults() == Faults(
        2, 4, frozenset(["not finite", "away"]), frozenset(["gone", "late"])
    )
    assert group(actors).take_faults() == Faults(
        1, 2, frozenset(["not finite"]), frozenset(["away"])
    )
    assert group(actors).last_failures() == ["not finite"]
