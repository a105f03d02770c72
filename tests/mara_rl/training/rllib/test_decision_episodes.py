"""Forced rows leave the episodes, rewards on them move to the decision before."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from envs.accept_reject_task import Answer
from envs.observation import FORCED, X_FIELDS, observation_space
from envs.protocols import Prompt
from mara_rl.training.rllib.decision_episodes import DecisionEpisodes, decision_rows

SPACE = observation_space(4, prefix=False, state_dtype="float16")


def episode(forced: list[int], *, terminal_reward: float | None) -> SingleAgentEpisode:
    """One row per entry of ``forced``; row i has h = i and action i % 2."""
    n = len(forced)
    observations = []
    for i, flag in enumerate([*forced, 1]):
        x = np.zeros(len(X_FIELDS), np.float32)
        x[FORCED] = flag
        observations.append({"h": np.full(4, i, np.float16), "x": x})
    rewards = [0.0] * n
    if terminal_reward is not None:
        rewards[-1] = terminal_reward
    infos = [{} for _ in range(n)] + [{"entry_id": "7-0"}]
    return SingleAgentEpisode(
        observations=observations,
        observation_space=SPACE,
        actions=[np.int64(i % 2) for i in range(n)],
        rewards=rewards,
        infos=infos,
        terminated=terminal_reward is not None,
        extra_model_outputs={Columns.ACTION_LOGP: [np.float32(-i) for i in range(n)]},
        len_lookback_buffer=0,
    ).to_numpy()


def test_forced_rows_go_and_the_reward_moves_back() -> None:
    shorter = decision_rows(episode([1, 0, 1, 0, 1, 1], terminal_reward=2.5))
    assert len(shorter) == 2
    assert shorter.get_observations()["h"][:, 0].tolist() == [1, 3, 6]
    assert shorter.get_rewards().tolist() == [0, 2.5]
    assert shorter.get_actions().tolist() == [1, 1]
    assert shorter.get_extra_model_outputs(Columns.ACTION_LOGP).tolist() == [-1, -3]
    assert shorter.get_infos(-1) == {"entry_id": "7-0"}
    assert shorter.is_terminated


def test_a_chunk_that_goes_on_keeps_its_bootstrap_observation() -> None:
    shorter = decision_rows(episode([0, 1, 1], terminal_reward=None))
    assert len(shorter) == 1
    assert shorter.get_observations()["h"][:, 0].tolist() == [0, 3]
    assert not shorter.is_done


def test_a_chunk_without_a_decision_is_dropped() -> None:
    assert decision_rows(episode([1, 1], terminal_reward=None)) is None


def test_the_end_of_an_episode_always_reaches_the_learner() -> None:
    """Its info carries the prompt's delivery, even where nothing was decided."""
    last = decision_rows(episode([1, 1], terminal_reward=1.5))
    assert len(last) == 1
    assert last.get_rewards().tolist() == [1.5]
    assert last.get_observations()["x"][0, FORCED] == 1
    assert last.get_infos(-1) == {"entry_id": "7-0"}


class FakePrompts:
    """Notes which prompts were said to have failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def fail(self, prompt: Prompt, reason: str) -> None:
        self.failed.append(prompt.entry_id)


class FakeMetrics(Counter[str]):
    """The sums of what is logged, by name, and a series: the entries."""

    def __init__(self) -> None:
        super().__init__()
        self.entry_ids: list[str] = []

    def log_value(self, name: tuple[str, str], value: Any, *, reduce: str) -> None:
        assert name[0] == "mara"
        if name[1] == "entry_ids":
            assert reduce == "item_series"
            self.entry_ids.append(value)
        else:
            assert reduce == "sum"
            self[name[1]] += value


def end_of_sample(
    answers: dict[int, Answer], samples: list[SingleAgentEpisode]
) -> tuple[FakePrompts, FakeMetrics]:
    """Run the callback on answers that score as they already say."""
    prompts, metrics = FakePrompts(), FakeMetrics()
    task = SimpleNamespace(
        score=lambda answers: None,
        prompts=prompts,
        scorer=SimpleNamespace(counters=Counter()),
    )
    env = SimpleNamespace(task=task, take_finished=lambda: answers)
    runner = SimpleNamespace(env=SimpleNamespace(unwrapped=env))
    DecisionEpisodes().on_sample_end(env_runner=runner, metrics_logger=metrics, samples=samples)
    return prompts, metrics


def finished(key: int) -> SingleAgentEpisode:
    ended = episode([0, 0], terminal_reward=0.0)
    ended.infos.data[-1].update(answer_key=key, entry_id=f"{key}-0")
    return ended


def answer(entry: str, reward: float, **failure: object) -> Answer:
    reason = "failed" if failure else "stop"
    return Answer(Prompt("Hi", entry, entry), reason, reward=reward, **failure)


def test_rewards_are_set_and_failed_episodes_deleted() -> None:
    samples = [finished(1), finished(2), finished(3), episode([0], terminal_reward=None)]
    answers = {
        1: answer("1-0", 2.0),
        2: answer("2-0", 0.0, failure="score not finite"),
        3: answer("3-0", 0.0, failure="service is away", outage=True),
    }
    prompts, metrics = end_of_sample(answers, samples)
    assert [float(e.get_rewards()[-1]) for e in samples] == [2.0, 0.0]
    assert not samples[1].is_done
    assert prompts.failed == ["2-0"], "an outage is not the prompt's fault"
    assert metrics.entry_ids == ["1-0"], "only what is learned from counts as delivered"


def test_without_any_score_nothing_is_trained_on() -> None:
    samples = [finished(1), episode([0], terminal_reward=None)]
    _, metrics = end_of_sample(
        {1: answer("1-0", 0.0, failure="service is away", outage=True)}, samples
    )
    assert samples == []
    assert metrics.entry_ids == []


def test_a_failed_answer_counts_by_its_prompt_alone() -> None:
    answers = {
        1: answer("1-0", 2.0),
        2: answer("2-0", 0.0, failure="score not finite"),
    }
    answers[1].prefill_tokens, answers[2].prefill_tokens = 7, 5
    task = SimpleNamespace(score=lambda answers: None, prompts=FakePrompts())
    env = SimpleNamespace(task=task, take_finished=lambda: answers)
    callback, metrics = DecisionEpisodes(), FakeMetrics()
    runner = SimpleNamespace(env=SimpleNamespace(unwrapped=env))
    callback.on_sample_end(env_runner=runner, metrics_logger=metrics, samples=[])
    assert metrics["answers"] == 1
    assert metrics["prefill_tokens"] == 12, "its prompt went through the LLM too"


def test_a_chunk_of_decisions_stays_as_it_is() -> None:
    whole = episode([0, 0], terminal_reward=1.0)
    assert decision_rows(whole) is whole
