"""Streamed text equals the whole text, and holds back what might still change."""

import pytest
import torch

from mara_rl.decoding.text_stream import TextStream
from mara_rl.llm.policy_llm import PolicyLLM

TEXTS = ["Hello there, world.", "naïve façade 你好 🙂🙃 ok", "  two  spaces\n\n\tand a tab", "🙂"]


def pieces(llm: PolicyLLM, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(llm, stop)
    found = []
    for token in llm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            return found, stream
    return [*found, stream.finish()], stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_without_half_characters(smollm2: PolicyLLM, text: str) -> None:
    found, stream = pieces(smollm2, text)
    assert "".join(found) == stream.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert len(smollm2.tokenizer(text)["input_ids"]) < 3 or sum(map(bool, found)) > 1


def test_random_tokens_join_to_what_the_tokenizer_makes_of_them(smollm2: PolicyLLM) -> None:
    for _ in range(20):
        ids = torch.randint(0, 49152, (30,)).tolist()
        stream = TextStream(smollm2)
        found = [stream.push(token) for token in ids]
        assert "".join([*found, stream.finish()]) == smollm2.text(ids)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("world",), "Hello there, "),
        (("there, w", "lo th"), "Hel"),
        (("nowhere",), "Hello there, world."),
        ((".", "ld."), "Hello there, wor"),
    ],
)
def test_a_stop_text_ends_the_text_before_it(
    smollm2: PolicyLLM, stop: tuple[str, ...], expected: str
) -> None:
    found, stream = pieces(smollm2, TEXTS[0], stop)
    assert "".join(found) == stream.text == expected
    assert stream.stopped == (expected != TEXTS[0])


def test_the_beginning_of_a_stop_text_is_held_back(smollm2: PolicyLLM) -> None:
    ids = smollm2.tokenizer("a b c", add_special_tokens=False)["input_ids"]
    stream = TextStream(smollm2, (" b x",))
    assert [stream.push(token) for token in ids] == ["a", "", " b c"]
    stream = TextStream(smollm2, (" b x",))
    assert [stream.push(token) for token in ids[:2]] == ["a", ""]
    assert stream.finish() == " b"
