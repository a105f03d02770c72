"""The slot engine against plain forwards without a cache, one sequence at a time."""

import pytest
import torch

from mara_rl.errors import ConfigError
from mara_rl.policy_llm import PolicyLLM
from mara_rl.slot_engine import SlotEngine

TOLERANCE = 2e-5


def plain_state(llm: PolicyLLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]


def assert_states(llm: PolicyLLM, h: torch.Tensor, sequences: list[list[int]]) -> None:
    for row, tokens in enumerate(sequences):
        torch.testing.assert_close(h[row], plain_state(llm, tokens), rtol=1e-4, atol=TOLERANCE)


def random_tokens(n: int) -> list[int]:
    return torch.randint(3, 90, (n,)).tolist()


def test_mixed_lengths_rejections_and_slot_reuse(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 3)
    sequences = [random_tokens(n) for n in (4, 17, 9)]
    assert_states(tiny_llm, engine.prefill([0, 1, 2], sequences), sequences)
    for _ in range(30):
        pending = torch.randint(3, 90, (3,))
        h = engine.propose(pending)
        looked = [[*s, int(t)] for s, t in zip(sequences, pending, strict=True)]
        assert_states(tiny_llm, h, looked)
        accepted = torch.rand(3) < 0.5  # the others are rejected and overwritten
        engine.commit(accepted)
        sequences = [
            new if ok else old for old, new, ok in zip(sequences, looked, accepted, strict=True)
        ]
    engine.clear([1])
    sequences[1] = random_tokens(5)  # shorter than what the slot held
    assert_states(tiny_llm, engine.prefill([1], [sequences[1]]), [sequences[1]])
    pending = torch.randint(3, 90, (3,))
    h = engine.propose(pending)
    looked = [[*s, int(t)] for s, t in zip(sequences, pending, strict=True)]
    assert_states(tiny_llm, h, looked)


def test_prefill_in_chunks_while_others_run(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 2)
    running, prompt = random_tokens(6), random_tokens(40)
    engine.prefill([0], [running])
    for start in range(0, 40, 7):
        h = engine.prefill([1], [prompt[start : start + 7]])
        pending = torch.randint(3, 90, (2,))
        proposed = engine.propose(pending)
        running.append(int(pending[0]))
        engine.commit(torch.tensor([True, False]))
        torch.testing.assert_close(
            proposed[0], plain_state(tiny_llm, running), rtol=1e-4, atol=TOLERANCE
        )
    torch.testing.assert_close(h[0], plain_state(tiny_llm, prompt), rtol=1e-4, atol=TOLERANCE)


def test_logits_are_the_llms(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 1)
    tokens = random_tokens(12)
    logits = engine.logits(engine.prefill([0], [tokens]))
    with torch.inference_mode():
        expected = tiny_llm.model(torch.tensor([tokens])).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_token_counts(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 2)
    engine.prefill([0, 1], [random_tokens(4), random_tokens(9)])
    engine.propose(torch.tensor([5, 6]))
    assert engine.prefill_tokens == 13
    assert engine.candidate_tokens == 2


def test_eager_attention_gives_the_same_states(tiny_llm: PolicyLLM) -> None:
    sequence = random_tokens(20)
    expected = plain_state(tiny_llm, sequence)
    tiny_llm.model.set_attn_implementation("eager")
    states = SlotEngine(tiny_llm, 2).prefill([1], [sequence])
    torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=TOLERANCE)


def test_unknown_attention_is_refused(tiny_llm: PolicyLLM) -> None:
    tiny_llm.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="expected 'sdpa' or 'eager'"):
        SlotEngine(tiny_llm, 1)


def test_a_scrubbed_slot_forgets_states_that_are_not_finite(tiny_llm: PolicyLLM) -> None:
    engine = SlotEngine(tiny_llm, 2)
    sequence = random_tokens(9)
    engine.prefill([0, 1], [sequence, random_tokens(30)])
    with torch.inference_mode():
        engine._cache.layers[0].values[0, :, 3:] = float("nan")
    assert not engine.propose(torch.tensor([5, 5]))[0].isfinite().all()
    engine.scrub([0])
    states = engine.prefill([0], [sequence])
    torch.testing.assert_close(states[0], plain_state(tiny_llm, sequence), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_smollm2(smollm2: PolicyLLM) -> None:
    engine = SlotEngine(smollm2, 2)
    sequences = [smollm2.prompt_ids(p) for p in ("Hi", "How do I keep basil alive in winter?")]
    engine.prefill([0, 1], sequences)
    for _ in range(4):
        pending = torch.randint(100, 40000, (2,))
        h = engine.propose(pending)
        for row in (0, 1):
            torch.testing.assert_close(
                h[row],
                plain_state(smollm2, [*sequences[row], int(pending[row])]),
                rtol=1e-3,
                atol=2e-3,
            )
        engine.commit(torch.tensor([True, False]))
        sequences[0] = [*sequences[0], int(pending[0])]
