"""The same on a GPU as on the CPU. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_agents import random_agent

from envs.list_prompt_source import ListPromptSource
from envs.protocols import Prompt
from envs.vector_env import TokenAcceptRejectVectorEnv
from mara_rl.agents.agent import Agent
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.policy_llm import PolicyLLM, load_policy_llm
from mara_rl.llm.slot_engine import SlotEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["Hi", "How do I bake bread?", "What is the time in Lima?", "a", "Tell me a story."]
Pair = tuple[PolicyLLM, PolicyLLM]


@pytest.fixture(params=["llama", "mistral", "gemma2", "qwen2", "qwen3"])
def pair(request: pytest.FixtureRequest, tiny_llms: dict[str, Path]) -> Pair:
    """A tiny LLM of each family on the CPU, and on the GPU."""
    folder = str(tiny_llms[request.param])
    cpu, cuda = (load_policy_llm(folder, device=d, dtype="float32") for d in ("cpu", "cuda"))
    return cpu, cuda


def answers(llm: PolicyLLM, agent: Agent, **settings: object) -> list:
    decoder = Decoder(llm, 2, free_tokens=6)
    blend = Blend.of([agent.to(llm.device)])
    requests = [
        DecodeRequest.of(
            llm, prompt, DecodeSettings(seed=i, max_new_tokens=9, **settings), blend=blend
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    return [(a.token_ids, a.choices, a.looked) for a in decoder.run(requests)]


@pytest.mark.parametrize("head", ["paper", "anchored", "relative", "advantage"])
def test_answers(pair: Pair, head: str) -> None:
    cpu, cuda = pair
    agent = random_agent(cpu, head)
    for rule in ("argmax_induced", "threshold", "sample"):
        expected = answers(cpu, agent, rule=rule)
        assert answers(cuda, agent, rule=rule) == expected


def test_states_over_a_cache_that_grows(pair: Pair) -> None:
    """Past the first capacity, with rejections, against forwards of the whole sequence."""
    cpu, cuda = pair
    engine = SlotEngine(cuda, 2)
    sequences = [torch.randint(3, 90, (n,)).tolist() for n in (122, 40)]
    engine.prefill([0, 1], sequences)
    for step in range(12):
        tokens = torch.randint(3, 90, (5,))
        first = torch.zeros(2, dtype=torch.long)
        h = engine.look(torch.tensor([0, 1]), torch.tensor([3, 2]), tokens, first).cpu()
        looked = [[*sequences[row], int(t)] for row, t in zip((0, 0, 0, 1, 1), tokens, strict=True)]
        for state, sequence in zip(h, looked, strict=True):
            with torch.inference_mode():
                plain = cpu.model.base_model(torch.tensor([sequence])).last_hidden_state[0, -1]
            torch.testing.assert_close(state, plain, rtol=1e-3, atol=2e-4)
        engine.take(torch.tensor([0, 1]), torch.tensor([step % 3, step % 2]))
        sequences = [looked[step % 3], looked[3 + step % 2]]


def test_bfloat16_is_what_a_gpu_gets_unless_told(tiny_llms: dict[str, Path]) -> None:
    llm = load_policy_llm(str(tiny_llms["llama"]))
    assert (llm.device.type, llm.model.dtype) == ("cuda", torch.bfloat16)
    found = answers(
        llm, random_agent(load_policy_llm(str(tiny_llms["llama"]), device="cpu"), "advantage")
    )
    assert all(tokens for tokens, *_ in found)


def test_rollouts(pair: Pair) -> None:
    """The vector environment's observations, rejecting half of what it is shown."""
    seen = []
    for llm in pair:
        env = TokenAcceptRejectVectorEnv(
            3,
            llm=llm,
            max_new_tokens=6,
            prefix=True,
            prompts=lambda: ListPromptSource([Prompt(text, text) for text in PROMPTS]),
            scorer=LengthScorer(),
        )
        rng = np.random.default_rng(0)
        observation, _ = env.reset(seed=0)
        steps = []
        for _ in range(25):
            observation, reward, *_ = env.step(rng.integers(0, 2, 3))
            steps.append((observation["h"], observation["x"], reward))
        seen.append(steps)
    for cpu, cuda in zip(*seen, strict=True):
        for expected, found in zip(cpu, cuda, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


class LengthScorer:
    """Scores an answer by its length."""

    names = ("reward", "cost")

    def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([[len(answer), -len(answer)] for _, answer in pairs], dtype=float)
