"""The slot engine against plain forwards without a cache, one sequence at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_llms import SIZES, WINDOW

from mara_rl.common.errors import ConfigError
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.llm.slot_engine import SlotEngine

TOLERANCE = 2e-5
GPT = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
SPARSE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
OTHER_FAMILIES: dict[str, Callable[[], Any]] = {
    "Cohere": lambda: transformers.CohereConfig(**SIZES),
    "Gemma3": lambda: transformers.Gemma3TextConfig(head_dim=8, sliding_window=WINDOW, **SIZES),
    "GPT2": lambda: transformers.GPT2Config(initializer_range=0.4, **GPT),
    "GPTNeoX": lambda: transformers.GPTNeoXConfig(initializer_range=0.4, **GPT),
    "Granite": lambda: transformers.GraniteConfig(logits_scaling=8.0, **SIZES),
    "OLMo2": lambda: transformers.Olmo2Config(**SIZES),
    "Phi3": lambda: transformers.Phi3Config(sliding_window=WINDOW, **SIZES),
    "Qwen3MoE": lambda: transformers.Qwen3MoeConfig(head_dim=8, **SPARSE, **SIZES),
    "SmolLM3": lambda: transformers.SmolLM3Config(**SIZES),
}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt-oss": (
        lambda: transformers.GptOssConfig(
            head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW, **SIZES
        ),
        "GptOssForCausalLM is not supported: attention sinks",
    ),
    "StableLM": (
        lambda: transformers.StableLmConfig(**SIZES),
        "StableLmForCausalLM is not supported: TypeError",
    ),
    "Mamba": (
        lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2),
        "MambaForCausalLM is not supported: its config has no max_position_embeddings",
    ),
}


def random_llm(config: Any, tokenizer: Any) -> PolicyLLM:
    config.vocab_size = 99
    torch.manual_seed(0)
    return PolicyLLM("tiny", transformers.AutoModelForCausalLM.from_config(config), tokenizer)


def plain_state(llm: PolicyLLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]


def assert_states(llm: PolicyLLM, h: torch.Tensor, sequences: list[list[int]]) -> None:
    for row, tokens in enumerate(sequences):
        torch.testing.assert_close(h[row], plain_state(llm, tokens), rtol=1e-4, atol=TOLERANCE)


def random_tokens(n: int) -> list[int]:
    return torch.randint(3, 90, (n,)).tolist()


def test_mixed_lengths_rejections_and_slot_reuse(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 3)
    sequences = [random_tokens(n) for n in (4, 17, 9)]
    assert_states(any_llm, engine.prefill([0, 1, 2], sequences), sequences)
    for _ in range(30):
        pending = torch.randint(3, 90, (3,))
        h = engine.propose(pending)
        looked = [[*s, int(t)] for s, t in zip(sequences, pending, strict=True)]
        assert_states(any_llm, h, looked)
        accepted = torch.rand(3) < 0.5  # the others are rejected and overwritten
        engine.commit(accepted)
        sequences = [
            new if ok else old for old, new, ok in zip(sequences, looked, accepted, strict=True)
        ]
    engine.clear([1])
    sequences[1] = random_tokens(5)  # shorter than what the slot held
    assert_states(any_llm, engine.prefill([1], [sequences[1]]), [sequences[1]])
    pending = torch.randint(3, 90, (3,))
    h = engine.propose(pending)
    looked = [[*s, int(t)] for s, t in zip(sequences, pending, strict=True)]
    assert_states(any_llm, h, looked)


def test_prefill_in_chunks_while_others_run(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 2)
    running, prompt = random_tokens(6), random_tokens(40)
    engine.prefill([0], [running])
    for start in range(0, 40, 7):
        h = engine.prefill([1], [prompt[start : start + 7]])
        pending = torch.randint(3, 90, (2,))
        proposed = engine.propose(pending)
        running.append(int(pending[0]))
        engine.commit(torch.tensor([True, False]))
        torch.testing.assert_close(
            proposed[0], plain_state(any_llm, running), rtol=1e-4, atol=TOLERANCE
        )
    torch.testing.assert_close(h[0], plain_state(any_llm, prompt), rtol=1e-4, atol=TOLERANCE)


def test_logits_are_the_llms(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 1)
    tokens = random_tokens(12)
    logits = engine.logits(engine.prefill([0], [tokens]))
    with torch.inference_mode():
        expected = any_llm.model(torch.tensor([tokens])).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_families_that_nobody_named_are_decoded_right(tiny_llm: PolicyLLM, family: str) -> None:
    llm = random_llm(OTHER_FAMILIES[family](), tiny_llm.tokenizer)
    tokens = random_tokens(25)
    engine = SlotEngine(llm, 1)
    engine.prefill([0], [tokens[:-1]])
    looked = torch.tensor([5, tokens[-1], 6])
    logits = engine.logits(
        engine.look(torch.tensor([0]), torch.tensor([3]), looked, torch.zeros(1).long())
    )
    with torch.inference_mode():
        expected = llm.model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=TOLERANCE)


def test_a_context_ends_where_the_frequencies_of_longrope_would_change(tiny_llm) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = transformers.Phi3Config(
        rope_parameters=rope, original_max_position_embeddings=64, **SIZES
    )
    llm = random_llm(config, tiny_llm.tokenizer)
    assert llm.context_tokens == 64
    SlotEngine(llm, 1)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_what_would_be_decoded_wrong_is_refused(tiny_llm: PolicyLLM, family: str) -> None:
    config, message = UNSUPPORTED[family]
    for _ in range(2):  # it stays refused
        with pytest.raises(ConfigError, match=f"llm 'tiny': architecture {message}"):
            SlotEngine(random_llm(config(), tiny_llm.tokenizer), 1)


def test_an_llm_whose_logits_are_not_known_is_refused(
    tiny_llm: PolicyLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = random_llm(transformers.LlamaConfig(**SIZES), tiny_llm.tokenizer)
    forward = type(llm.model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(llm.model), "forward", scaled)
    with pytest.raises(ConfigError, match=r"decoding in slots is .* nats from the LLM's own"):
        SlotEngine(llm, 1)


def test_token_counts(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 2)
    engine.prefill([0, 1], [random_tokens(4), random_tokens(9)])
    engine.propose(torch.tensor([5, 6]))
    assert engine.prefill_tokens == 13
    assert engine.candidate_tokens == 2


def test_looking_at_several_candidates_and_taking_any(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 4)
    sequences = {slot: random_tokens(n) for slot, n in ((0, 4), (1, 23), (3, 9))}
    engine.prefill(list(sequences), list(sequences.values()))
    widths_seen = set()
    for _ in range(20):
        slots = torch.tensor([slot for slot in sequences if torch.rand(()) < 0.8] or [1])
        looked = torch.zeros(len(slots), dtype=torch.long)
        candidates: list[list[int]] = [[] for _ in slots]
        for _ in range(2):  # in two goes: the first go's candidates can still be taken
            counts = torch.randint(1, 6, (len(slots),))
            widths_seen.add(len(set(counts.tolist())) > 1)
            tokens = torch.randint(3, 90, (int(counts.sum()),))
            h = engine.look(slots, counts, tokens, looked)
            states = h.split(counts.tolist())
            for row, more in enumerate(tokens.split(counts.tolist())):
                base = sequences[int(slots[row])]
                assert_states(any_llm, states[row], [[*base, t] for t in more.tolist()])
                candidates[row] += more.tolist()
            looked += counts
        chosen = torch.stack([torch.randint(0, int(n), ()) for n in looked])
        engine.take(slots, chosen)
        for row, slot in enumerate(slots.tolist()):
            sequences[slot].append(candidates[row][int(chosen[row])])
    assert widths_seen == {True, False} or widths_seen == {True}
    pending = torch.randint(3, 90, (4,))
    h = engine.propose(pending)
    for slot, tokens in sequences.items():
        assert_states(any_llm, h[slot : slot + 1], [[*tokens, int(pending[slot])]])


def test_candidates_that_follow_one_looked_at_before(any_llm: PolicyLLM) -> None:
    engine = SlotEngine(any_llm, 2)
    sequences = [random_tokens(5), random_tokens(19)]
    engine.prefill([0, 1], sequences)
    for _ in range(8):
        at, first = torch.arange(2), torch.tensor([3, 2])
        tokens = torch.randint(3, 90, (5,))
        engine.look(at, first, tokens, torch.zeros(2, dtype=torch.long))
        leader = torch.tensor([1, 0])
        leading = [int(tokens[1]), int(tokens[3])]
        # Two more candidates for slot 0 and one for slot 1, then two followers each.
        more = torch.randint(3, 90, (7,))
        parents = torch.tensor([-1, -1, 1, 1, -1, 0, 0])
        states = engine.look(at, torch.tensor([4, 3]), more, first, parents)
        expected = [[*sequences[0], int(t)] for t in more[:2]]
        expected += [[*sequences[0], leading[0], int(t)] for t in more[2:4]]
        expected += [[*sequences[1], int(more[4])]]
        expected += [[*sequences[1], leading[1], int(t)] for t in more[5:]]
        assert_states(any_llm, states, expected)
        engine.take(at, leader)
        sequences = [[*s, t] for s, t in zip(sequences, leading, strict=True)]
        # The followers are candidates now, one place earlier; one of them is taken.
        engine.take(at, torch.tensor([3 + 2 + 1 - 1, 2 + 1 + 0 - 1]))
        sequences = [[*sequences[0], int(more[3])], [*sequences[1], int(more[5])]]
