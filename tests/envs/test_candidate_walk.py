"""Slots that read the same prompt share its prefill, and are none the wiser."""

import torch

from envs.candidate_walk import ACCEPT, CandidateWalk
from mara_rl.llm.candidates import CandidateRule
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.llm.slot_engine import SlotEngine

PROMPT, OTHER = list(range(3, 26)), list(range(40, 51))
CHUNK = 7
LATE = 3


def walked(llm: PolicyLLM, prompts: list[list[int]], steps: int) -> CandidateWalk:
    """A walk that accepts everything; slot `LATE`, if there is one, starts a step later."""
    walk = CandidateWalk(
        SlotEngine(llm, len(prompts)), CandidateRule(top_k=8, top_p=1.0), prefill_chunk_tokens=CHUNK
    )
    for slot, prompt in enumerate(prompts):
        if slot != LATE:
            walk.start(slot, prompt)
    for step in range(steps):
        if step == 1 and len(prompts) > LATE:
            walk.start(LATE, prompts[LATE])
        walk.step(torch.full((len(prompts),), ACCEPT))
    return walk


def test_shared_prefill_equals_prefill_of_ones_own(tiny_llm: PolicyLLM) -> None:
    steps = 12
    together = walked(tiny_llm, [PROMPT, OTHER, PROMPT, PROMPT], steps)
    for slot, prompt in enumerate([PROMPT, OTHER, PROMPT, PROMPT]):
        alone = walked(tiny_llm, [prompt], steps - (slot == LATE))
        assert together.tokens[slot] == alone.tokens[0]
        torch.testing.assert_close(together.h[slot], alone.h[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(together.h_prefix[slot], alone.h_prefix[0], rtol=1e-4, atol=2e-5)
    # The first two readers of PROMPT share all of it; the late one reads it by itself.
    assert together.engine.prefill_tokens == 2 * len(PROMPT) + len(OTHER)


def test_a_slot_that_shares_a_prefill_can_be_stopped_in_its_midst(tiny_llm: PolicyLLM) -> None:
    walk = CandidateWalk(
        SlotEngine(tiny_llm, 2), CandidateRule(top_k=8, top_p=1.0), prefill_chunk_tokens=CHUNK
    )
    walk.start(0, PROMPT)
    walk.start(1, PROMPT)
    walk.step(torch.full((2,), ACCEPT))
    walk.start(0, OTHER)  # the one that was reading for both
    for _ in range(5):
        walk.step(torch.full((2,), ACCEPT))
    alone = walked(tiny_llm, [PROMPT], 6)
    assert walk.tokens[1] == alone.tokens[0]
    torch.testing.assert_close(walk.h[1], alone.h[0], rtol=1e-4, atol=2e-5)
