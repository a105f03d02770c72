"""In bfloat16 looking at several at once rounds otherwise than one at a time: by how much."""

import pytest
import torch

from mara_rl.llm.candidates import CandidateRule, candidate_sets
from mara_rl.llm.policy_llm import SMOLLM2, load_policy_llm
from mara_rl.llm.slot_engine import SlotEngine
from mara_rl.prompts import packaged_prompts


@pytest.mark.slow
def test_logits_differ_little_and_few_choices_flip() -> None:
    """Next-token logits after each of 8 candidates, in one forward and in eight."""
    llm = load_policy_llm(SMOLLM2, device="cpu", dtype="bfloat16")
    prompts = [llm.prompt_ids(p.prompt) for p in packaged_prompts("heldout")[:6]]
    at, none = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.long)
    wide, narrow = SlotEngine(llm, len(prompts)), SlotEngine(llm, len(prompts))
    h = wide.prefill(at.tolist(), prompts)
    narrow.prefill(at.tolist(), prompts)
    ids = candidate_sets(wide.logits(h), CandidateRule(top_k=8, top_p=1.0)).ids
    together = wide.logits(wide.look(at, none + 8, ids.flatten(), none)).unflatten(0, (-1, 8))
    apart = torch.stack([narrow.logits(narrow.propose(ids[:, k])) for k in range(8)], dim=1)
    differences = (together - apart).abs()
    assert 0 < differences.max() < 1.0  # logits reach from some −10 to 30
    assert differences.mean() < 0.1
    flipped = (together.argmax(-1) != apart.argmax(-1)).float().mean()
    assert flipped <= 0.1
