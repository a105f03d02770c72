"""The vector environment: equal to the single one, and Gymnasium's contract for RLlib."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from envs.list_prompt_source import ListPromptSource
from envs.observation import FORCED
from envs.protocols import Prompt
from envs.token_env import TokenAcceptRejectEnv
from envs.vector_env import TokenAcceptRejectVectorEnv
from mara_rl.common.errors import DataError, RetryableError

SLOTS = 3


def policy(candidate_id: int, step: int) -> int:
    """Any rule will do that depends only on what both environments show."""
    return (candidate_id * 7 + step) % 3 != 0


def run_vector(env: TokenAcceptRejectVectorEnv, steps: int) -> dict[str, list[tuple]]:
    """Episodes by prompt id: candidate ids, reward, response."""
    _, infos = env.reset(seed=0)
    trails: list[list[int]] = [[] for _ in range(env.num_envs)]
    episodes: dict[str, list[tuple]] = {}
    ids = infos["candidate_id"]
    for _ in range(steps):
        actions = np.array([policy(int(i), len(t)) for i, t in zip(ids, trails, strict=True)])
        for slot, trail in enumerate(trails):
            if ids[slot] >= 0:
                trail.append(int(ids[slot]))
        _, rewards, terminated, _, infos = env.step(actions)
        for slot in np.flatnonzero(terminated):
            episode = (tuple(trails[slot]), rewards[slot], infos["response"][slot])
            episodes.setdefault(infos["prompt_id"][slot], []).append(episode)
            trails[slot] = []
        ids = infos["candidate_id"]
    return episodes


def run_single(env: TokenAcceptRejectEnv, episodes: int) -> dict[str, tuple]:
    result = {}
    for episode in range(episodes):
        _, info = env.reset(seed=0 if episode == 0 else None)
        trail, done = [], False
        while not done:
            action = policy(info["candidate_id"], len(trail))
            trail.append(info["candidate_id"])
            _, reward, done, _, info = env.step(np.int64(action))
        result[info["prompt_id"]] = (tuple(trail), reward, info["response"])
    return result


def test_same_candidates_tokens_and_rewards_as_the_single_env(settings) -> None:
    single = run_single(TokenAcceptRejectEnv(**settings()), 4)
    vector = run_vector(TokenAcceptRejectVectorEnv(SLOTS, **settings()), 200)
    assert set(vector) == set(single) == {"p0", "p1", "p2", "p3"}
    for prompt_id, episodes in vector.items():
        assert len(episodes) > 1, "slots must be reused"
        for trail, reward, response in episodes:
            assert (trail, response) == (single[prompt_id][0], single[prompt_id][2])
            assert reward == pytest.approx(single[prompt_id][1])


def test_next_step_autoreset_and_fresh_arrays(settings) -> None:
    env = TokenAcceptRejectVectorEnv(SLOTS, **settings())
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, infos = env.reset(seed=0)
    kept = []
    was_done = np.zeros(SLOTS, dtype=bool)
    resets = 0
    for _ in range(60):
        kept.append((observation, {key: value.copy() for key, value in observation.items()}))
        observation, rewards, terminated, truncated, infos = env.step(np.ones(SLOTS, dtype=int))
        assert env.observation_space.contains(observation)
        assert not (terminated & was_done).any(), "a reset row never ends an episode"
        assert (rewards[was_done] == 0).all()
        assert (infos["candidate_id"][was_done] >= 0).all(), "the reset row shows a candidate"
        resets += was_done.sum()
        for key, value in infos.items():
            if not key.startswith("_"):
                assert isinstance(value, np.ndarray)
                assert infos[f"_{key}"].dtype == bool
        if "response" in infos:
            assert (infos["_response"] == (terminated | truncated)).all()
        was_done = terminated | truncated
    assert resets > SLOTS
    for given, copy in kept:
        for key in copy:
            np.testing.assert_array_equal(given[key], copy[key])


def test_long_prompts_are_read_in_chunks_as_forced_rows(settings) -> None:
    prompts = [Prompt("x" * 50, "long"), Prompt("Hi", "short")]
    env = TokenAcceptRejectVectorEnv(
        2, **settings(prompts=lambda: ListPromptSource(prompts), prefill_chunk_tokens=40)
    )
    observation, infos = env.reset(seed=0)
    waiting = infos["candidate_id"] < 0
    assert waiting.sum() == 1
    assert observation["x"][waiting, FORCED] == 1
    assert (observation["h"][waiting] == 0).all()
    for _ in range(3):
        observation, _, _, _, infos = env.step(np.ones(2, dtype=int))
    assert (infos["candidate_id"] >= 0).all()


def test_failed_scores_truncate_only_their_episode(settings, scorer) -> None:
    env = TokenAcceptRejectVectorEnv(SLOTS, **settings())
    env.reset(seed=0)
    scorer.fail_next = RetryableError("reward service is away")
    failures = 0
    for _ in range(60):
        _, rewards, terminated, truncated, infos = env.step(np.ones(SLOTS, dtype=int))
        for slot in np.flatnonzero(truncated):
            failures += 1
            assert infos["failure"][slot] == "reward service is away"
            assert rewards[slot] == 0
    assert failures >= 1
    assert terminated.dtype == bool
    assert env.task.take_failures() == (failures, {"reward service is away"})
    assert env.task.take_failures() == (0, frozenset())


def test_answers_that_a_score_model_refuses_do_not_take_others_with_them(
    settings, scorer, monkeypatch
) -> None:
    score = scorer.score

    def picky(pairs: list[tuple[str, str]]) -> np.ndarray:
        if any(prompt == "Why?" for prompt, _ in pairs):
            raise DataError("what a question")
        return score(pairs)

    monkeypatch.setattr(scorer, "score", picky)
    env = TokenAcceptRejectVectorEnv(SLOTS, **settings(defer_scores=True))
    env.reset(seed=0)
    for _ in range(40):
        env.step(np.ones(SLOTS, dtype=int))
    answers = list(env.take_finished().values())
    env.task.score(answers)
    refused = [answer for answer in answers if answer.prompt.text == "Why?"]
    assert refused
    assert [answer for answer in answers if answer.finish_reason == "failed"] == refused
    assert {answer.failure for answer in refused} == {"what a question"}
    assert not any(answer.outage for answer in refused)
    assert env.task.take_failures() == (len(refused), {"what a question"})


def test_deferred_scores_leave_the_reward_to_later(settings, scorer) -> None:
    env = TokenAcceptRejectVectorEnv(SLOTS, **settings(defer_scores=True))
    env.reset(seed=0)
    ended = 0
    for _ in range(40):
        _, rewards, terminated, _, _ = env.step(np.ones(SLOTS, dtype=int))
        ended += terminated.sum()
        assert (rewards == 0).all()
    assert not scorer.calls
    finished = env.take_finished()
    assert len(finished) == ended
    assert not env.take_finished()
    env.task.score(list(finished.values()))
    assert scorer.calls == [ended], "one call for all"
    assert any(answer.reward != 0 for answer in finished.values())


def test_prompts_that_cannot_be_answered_are_rejected(settings) -> None:
    prompts = [Prompt("x" * 400, "too-long"), Prompt("  ", "empty"), Prompt("Hi", "good")]
    env = TokenAcceptRejectVectorEnv(2, **settings(prompts=lambda: ListPromptSource(prompts)))
    env.reset(seed=0)
    seen = set()
    for _ in range(40):
        _, _, terminated, _, infos = env.step(np.ones(2, dtype=int))
        seen |= {infos["prompt_id"][slot] for slot in np.flatnonzero(terminated)}
    assert seen == {"good"}
    with pytest.raises(DataError, match="none of them can be answered"):
        TokenAcceptRejectVectorEnv(
            1, **settings(prompts=lambda: ListPromptSource(prompts[:2]))
        ).reset(seed=0)


def test_bfloat16_bits(tiny_llm, settings) -> None:
    import torch

    from envs.observation import decode_state

    plain, _ = TokenAcceptRejectVectorEnv(2, **settings()).reset(seed=0)
    bits, _ = TokenAcceptRejectVectorEnv(2, **settings(state_dtype="bfloat16_bits")).reset(seed=0)
    assert bits["h"].dtype == np.int16
    np.testing.assert_allclose(
        decode_state(torch.from_numpy(bits["h"])),
        plain["h"].astype(np.float32),
        rtol=0.01,
        atol=0.01,
    )
