"""Padded forwards of all slots, as CUDA graphs run them, against ragged ones of some."""

import pytest
import torch
from small_agents import random_agent
from torch import Tensor

from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.policy_llm import PolicyLLM
from mara_rl.slot_engine import SlotEngine
from mara_rl.slot_graphs import Capture, Forward, SlotGraphs

CPU = torch.device("cpu")
PROMPTS = ["Hi", "How do I bake bread?", "What is the time in Lima?", "a", "Tell me a story."]


def uncaptured(forward: Forward, example: Tensor) -> Forward:
    return forward


def refused(forward: Forward, example: Tensor) -> Forward:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def wrong(forward: Forward, example: Tensor) -> Forward:
    return lambda fields: 1.1 * forward(fields)


def with_graphs(engine: SlotEngine) -> SlotGraphs:
    engine.graphs = SlotGraphs(engine.run, engine.num_slots, CPU, capture=uncaptured)
    return engine.graphs


def test_ragged_looks_are_the_same_padded(any_llm: PolicyLLM) -> None:
    """Some slots only, some with a parent, after rejections, over a growing cache."""
    plain, padded = SlotEngine(any_llm, 4), SlotEngine(any_llm, 4)
    graphs = with_graphs(padded)
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (5, 118, 9)]
    for engine in (plain, padded):
        engine.prefill([3, 0, 1], prompts)
    slots, none = torch.tensor([0, 3]), torch.zeros(2, dtype=torch.long)
    for _ in range(8):
        tokens = torch.randint(3, 90, (5,))
        first = [e.look(slots, torch.tensor([3, 2]), tokens, none) for e in (plain, padded)]
        torch.testing.assert_close(*first, rtol=1e-4, atol=2e-5)
        tokens, parents = torch.randint(3, 90, (4,)), torch.tensor([-1, 1, 1, -1])
        looked = torch.tensor([3, 2])
        then = [
            e.look(slots, torch.tensor([3, 1]), tokens, looked, parents) for e in (plain, padded)
        ]
        torch.testing.assert_close(*then, rtol=1e-4, atol=2e-5)
        for engine in (plain, padded):
            engine.take(slots, torch.tensor([1, 0]))
        pending = torch.randint(3, 90, (4,))
        states = [e.propose(pending) for e in (plain, padded)]
        torch.testing.assert_close(states[0][[0, 1, 3]], states[1][[0, 1, 3]], rtol=1e-4, atol=2e-5)
        for engine in (plain, padded):
            engine.commit(torch.tensor([False, True, False, True]))
    assert 2 <= graphs.captured <= 6


def test_answers_are_the_same(any_llm: PolicyLLM) -> None:
    agent = random_agent(any_llm, "advantage")
    requests = [
        DecodeRequest.of(any_llm, prompt, DecodeSettings(max_new_tokens=9), blend=Blend.of([agent]))
        for prompt in PROMPTS
    ]
    plain, padded = Decoder(any_llm, 2), Decoder(any_llm, 2)
    graphs = with_graphs(padded.engine)
    expected, found = plain.run(requests), padded.run(requests)
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert [a.looked for a in found] == [a.looked for a in expected]
    assert graphs.captured


def test_large_forwards_are_left_to_others(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 3)
    graphs = with_graphs(engine)
    graphs.max_tokens = 11
    engine.prefill([0, 1, 2], [[5, 6]] * 3)
    one, none = torch.tensor([1]), torch.tensor([0])
    engine.look(one, torch.tensor([3]), torch.tensor([3, 4, 5]), none)  # three slots of 4 make 12
    assert graphs.captured == 0
    engine.look(one, torch.tensor([2]), torch.tensor([3, 4]), none)
    assert graphs.captured == 1


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (refused, "operation not permitted when stream is capturing"),
        (wrong, "a graph's hidden states are not those of the forward"),
    ],
)
def test_without_graphs_where_they_cannot_be(
    tiny_llm: PolicyLLM, caplog: pytest.LogCaptureFixture, capture: Capture, reason: str
) -> None:
    plain, engine = SlotEngine(tiny_llm, 2), SlotEngine(tiny_llm, 2)
    engine.graphs = SlotGraphs(engine.run, 2, CPU, capture=capture)
    for e in (plain, engine):
        e.prefill([0, 1], [[5, 6], [7, 8, 9]])
    pending = torch.tensor([11, 12])
    for _ in range(2):
        torch.testing.assert_close(engine.propose(pending), plain.propose(pending))
    assert caplog.messages == [f"this LLM runs without CUDA graphs: {reason}"]
    assert engine.graphs.captured == 0
