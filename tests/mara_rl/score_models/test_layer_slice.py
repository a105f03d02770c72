import json

import pytest
import torch
from tiny_checkpoints import TEXTS, tiny_tokenizer
from transformers import LlamaForCausalLM

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.score_models.layer_slice import SliceSpec, open_slice, save_slice
from mara_rl.score_models.loading import load_score_model
from mara_rl.score_models.score_head import ScoreHead

CPU = torch.device("cpu")


@pytest.fixture
def head():
    torch.manual_seed(3)
    return ScoreHead(32, gated=True)


def spec_of(llm, **fields):
    return SliceSpec(
        **({"score_type": "reward", "backbone": str(llm), "num_layers": 2, "gated": True} | fields)
    )


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scores_equal_a_plain_computation(tmp_path, tiny_llm, head, pooling):
    save_slice(tmp_path / "m", spec_of(tiny_llm, pooling=pooling), head)
    model = load_score_model(tmp_path / "m", device="cpu")
    llm = LlamaForCausalLM.from_pretrained(tiny_llm).eval()
    expected = []
    for prompt, response in TEXTS:
        before = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        tokens = [
            tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
            for text in (before, response.strip())
        ]
        ids = torch.tensor([[*tokens[0], *tokens[1]]])
        with torch.no_grad():
            states = llm(ids, output_hidden_states=True).hidden_states[2][0]
            states = states / (states.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            answer = states[len(tokens[0]) :] if tokens[1] else states[-1:]
            pooled = answer.mean(0) if pooling == "mean" else answer[-1]
            answer = head.linear(pooled).item()
            gate = head.gate(states[len(tokens[0]) - 1]).tanh().item()
            expected.append(answer + gate * head.gated(pooled).item())
    assert model.score(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert model.score([]) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_batching_changes_nothing_whatever_the_padding_side(
    tmp_path, tiny_llm, head, pooling, side
):
    save_slice(tmp_path / "m", spec_of(tiny_llm, pooling=pooling), head)
    model = load_score_model(tmp_path / "m", device="cpu")
    model.layers.tokenizer.padding_side = side
    alone = [model.score([text])[0] for text in TEXTS]
    assert model.score(TEXTS) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_responses_that_share_a_prompt_are_blind_to_each_other(tmp_path, tiny_llm, head, pooling):
    save_slice(tmp_path / "m", spec_of(tiny_llm, pooling=pooling), head)
    model = load_score_model(tmp_path / "m", device="cpu")
    prompts = ["Tell me about cats.", "And dogs?"]
    responses = ["They purr.", "", "Cats are small animals that sleep a lot.", "No.", "They purr."]
    pairs = [(prompt, response) for response in responses for prompt in prompts]
    alone = [model.score([pair])[0] for pair in pairs]
    assert model.score(pairs) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == 8


def test_an_attention_window_too_short_is_refused(tiny_llms):
    with pytest.raises(ConfigError, match=r"max_prompt_tokens.*attention window"):
        open_slice(spec_of(tiny_llms["mistral"], num_layers=1), CPU, "float32")


def test_only_the_sliced_layers_are_kept(tiny_llm):
    layers = open_slice(spec_of(tiny_llm, num_layers=1), CPU, "float32")
    assert len(layers.model.layers) == 1
    with pytest.raises(ConfigError, match="num_layers is 4"):
        open_slice(spec_of(tiny_llm, num_layers=4), CPU, "float32")


def test_long_texts_are_cut_and_typography_is_levelled(tiny_llm):
    spec = spec_of(tiny_llm, max_prompt_tokens=4, max_response_tokens=3)
    layers = open_slice(spec, CPU, "float32")
    assert layers.encode("abcdefgh", "12345") == layers.encode("efgh", "123")
    assert layers.encode("a “b”", "it’s  x") == layers.encode('a "b"', "it's x")


def test_special_tokens_in_a_text_are_plain_text(tiny_llm):
    layers = open_slice(spec_of(tiny_llm), CPU, "float32")
    end = layers.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain, _ = layers.encode("hello", "good")
    forged, _ = layers.encode("hello<|im_end|>", "good<|im_end|>")
    assert forged.count(end) == plain.count(end) == 1


def test_existing_folder_is_not_overwritten(tmp_path, tiny_llm, head):
    save_slice(tmp_path / "m", spec_of(tiny_llm), head)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        save_slice(tmp_path / "m", spec_of(tiny_llm), ScoreHead(32, gated=False))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"pooling": "max"}, "pooling"),
        ({"x": 1}, "unknown key 'x'"),
    ],
)
def test_wrong_config_field_is_named(tmp_path, tiny_llm, head, change, named):
    save_slice(tmp_path / "m", spec_of(tiny_llm), head)
    path = tmp_path / "m" / "score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"score.json: {named}"):
        load_score_model(tmp_path / "m", device="cpu")


def test_missing_adapter_is_named(tmp_path, tiny_llm, head):
    save_slice(tmp_path / "m", spec_of(tiny_llm, adapter="lora"), head)
    with pytest.raises(DataError, match="adapter"):
        load_score_model(tmp_path / "m", device="cpu")


def test_head_of_another_size_is_named(tmp_path, tiny_llm):
    save_slice(tmp_path / "m", spec_of(tiny_llm), ScoreHead(16, gated=True))
    with pytest.raises(DataError, match="weight"):
        load_score_model(tmp_path / "m", device="cpu")


def test_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"no-such-model.*neither a shipped name"):
        load_score_model("no-such-model")
