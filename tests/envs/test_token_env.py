"""The single environment: the method's transitions, against plain forwards."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs
from envs.observation import BASE_LOGIT, FORCED, LOG_P, MASS_LEFT, TOKENS_LEFT, K
from envs.token_env import TokenAcceptRejectEnv
from mara_rl.llm.candidates import CandidateRule, candidate_sets


def test_every_transition_against_plain_forwards(tiny_llm, settings) -> None:
    env = TokenAcceptRejectEnv(**settings(prefix=True, top_p=0.6))
    rng = np.random.default_rng(0)
    seen = {"single": 0, "many": 0, "forced_last": 0, "rejected": 0}
    for episode in range(12):
        observation, info = env.reset(seed=0 if episode == 0 else None)
        prompt = env.task._open[0].prompt
        tokens, answer, k = tiny_llm.prompt_ids(prompt.text), [], 0
        while True:
            with torch.inference_mode():
                out = tiny_llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]
                sets = candidate_sets(
                    tiny_llm.model.lm_head(out)[None], CandidateRule(top_k=6, top_p=0.6)
                )
                token = int(sets.ids[0, k])
                h = tiny_llm.model.base_model(torch.tensor([[*tokens, token]])).last_hidden_state
            n, x = int(sets.counts[0]), observation["x"]
            forced = k == n - 1
            assert info["candidate_id"] == token
            assert x[FORCED] == forced
            assert x[K] == k
            assert x[TOKENS_LEFT] == 7 - len(answer)
            np.testing.assert_allclose(x[LOG_P], sets.probs[0, k].log(), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(x[MASS_LEFT], sets.mass_left[0, k], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(x[BASE_LOGIT], sets.base_logits[0, k], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(observation["h"], h[0, -1].half(), rtol=5e-3, atol=5e-3)
            np.testing.assert_allclose(observation["h_prefix"], out.half(), rtol=5e-3, atol=5e-3)
            seen["single"] += n == 1
            seen["many"] += n > 2
            seen["forced_last"] += forced and n > 1
            action = int(rng.random() < 0.5)
            observation, reward, terminated, truncated, info = env.step(np.int64(action))
            if action == 0 and not forced:
                seen["rejected"] += 1
                k += 1
                continue
            tokens, answer, k = [*tokens, token], [*answer, token], 0
            ended = token in tiny_llm.eos_ids or len(answer) == 7
            assert terminated == ended
            assert not truncated
            if ended:
                text = tiny_llm.text(answer)
                expected = len(text) / 4 - 2 * prompt.text.endswith("?")
                assert reward == pytest.approx(expected)
                assert info["response"] == text
                assert info["finish_reason"] == ("stop" if token in tiny_llm.eos_ids else "length")
                break
            assert reward == 0
    assert all(seen.values()), f"cases that never occurred: {seen}"


def test_reset_with_a_seed_repeats_the_prompts(settings) -> None:
    env = TokenAcceptRejectEnv(**settings())

    def prompts(seed: int) -> list[str]:
        env.reset(seed=seed)
        first = env.task._open[0].prompt.prompt_id
        env.reset()
        return [first, env.task._open[0].prompt.prompt_id]

    assert prompts(1) == prompts(1)
    assert len({tuple(prompts(seed)) for seed in range(8)}) > 1


def test_an_answer_without_a_score_is_truncated_not_zero(settings, scorer) -> None:
    env = TokenAcceptRejectEnv(**settings())
    env.reset(seed=0)
    scorer.fail_next = float("nan")
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, info = env.step(np.int64(1))
    assert truncated
    assert not terminated
    assert "not finite" in info["failure"]


def test_render_shows_the_pending_candidate(settings) -> None:
    env = TokenAcceptRejectEnv(**settings())
    env.reset(seed=0)
    assert env.render().endswith("]")


@pytest.mark.slow
def test_registered_env_passes_check_env() -> None:
    env = gym.make(envs.ENV_ID)
    check_env(env.unwrapped, skip_render_check=True)
