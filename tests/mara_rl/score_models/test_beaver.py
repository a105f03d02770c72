import json

import pytest
import torch
from tiny_checkpoints import TEXTS, BeaverFolder

from mara_rl.common.errors import DataError
from mara_rl.score_models.loading import load_score_model


@pytest.mark.parametrize("files", ["safetensors", "bin", "safetensors-sharded", "bin-sharded"])
def test_scores_equal_a_plain_computation(tmp_path, files):
    folder = BeaverFolder(tmp_path / "beaver")
    model = load_score_model(folder.write(files), device="cpu")
    expected = [folder.reference(*text) for text in TEXTS]
    assert model.score(TEXTS) == pytest.approx(expected, abs=1e-4)
    assert model.score([]) == []


@pytest.mark.parametrize(("score_type", "centre"), [("reward", 0.7), ("cost", 0.0)])
def test_normalisation_follows_the_score_type(tmp_path, score_type, centre):
    folder = BeaverFolder(tmp_path / "beaver", do_normalize=True, score_type=score_type)
    model = load_score_model(folder.write(), device="cpu")
    expected = [(folder.reference(*text) - centre) / (2.0 + 1e-8) for text in TEXTS]
    assert model.score(TEXTS) == pytest.approx(expected, abs=1e-4)
    assert model.score_type == score_type


def test_head_without_bias(tmp_path):
    folder = BeaverFolder(tmp_path / "beaver", score_bias=False)
    model = load_score_model(folder.write(), device="cpu")
    assert model.score(TEXTS[:1]) == pytest.approx([folder.reference(*TEXTS[0])], abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batching_changes_nothing_whatever_the_padding_side(tmp_path, side):
    model = load_score_model(BeaverFolder(tmp_path / "beaver").write(), device="cpu")
    model.tokenizer.padding_side = side
    alone = [model.score([text])[0] for text in TEXTS]
    assert model.score(TEXTS) == pytest.approx(alone, abs=1e-5)


def test_no_space_after_the_colon_and_nothing_appended(tmp_path):
    model = load_score_model(BeaverFolder(tmp_path / "beaver").write(), device="cpu")
    plain, spaced, ended = model.score([("p", "r"), ("p", " r"), ("p", "r<|im_end|>")])
    assert abs(plain - spaced) > 1e-4
    assert abs(plain - ended) > 1e-4


def test_head_stays_float32_over_a_bfloat16_model(tmp_path):
    model = load_score_model(BeaverFolder(tmp_path / "b").write(), device="cpu", dtype="bfloat16")
    assert model.network.score_head.weight.dtype == torch.float32
    assert model.network.model.norm.weight.dtype == torch.bfloat16
    assert len(model.score(TEXTS)) == len(TEXTS)


def test_old_rotary_buffers_are_accepted(tmp_path):
    folder = BeaverFolder(tmp_path / "beaver")
    folder.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert load_score_model(folder.write(), device="cpu").score(TEXTS[:1])


@pytest.mark.parametrize("key", ["score_head.weight", "score_head.bias", "normalizer.var"])
def test_missing_weight_is_named(tmp_path, key):
    folder = BeaverFolder(tmp_path / "beaver")
    del folder.state[key]
    with pytest.raises(DataError, match=key):
        load_score_model(folder.write(), device="cpu")


def test_wrong_shape_and_unknown_weight_are_named(tmp_path):
    folder = BeaverFolder(tmp_path / "shape")
    folder.state["score_head.weight"] = torch.randn(1, 16)
    with pytest.raises(DataError, match=r"score_head\.weight.*\(1, 16\).*\(1, 32\)"):
        load_score_model(folder.write(), device="cpu")
    folder = BeaverFolder(tmp_path / "unknown")
    folder.state["lm_head.weight"] = torch.randn(2, 2)
    with pytest.raises(DataError, match=r"lm_head\.weight"):
        load_score_model(folder.write(), device="cpu")


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_torn_weights_are_named(tmp_path, files):
    path = BeaverFolder(tmp_path / "beaver").write(files)
    weights = path / ("model.safetensors" if files == "safetensors" else "pytorch_model.bin")
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(DataError, match=weights.name):
        load_score_model(path, device="cpu")


def test_missing_shard_is_named(tmp_path):
    path = BeaverFolder(tmp_path / "beaver").write("bin-sharded")
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(DataError, match=r"pytorch_model-00002-of-00002\.bin"):
        load_score_model(path, device="cpu")


class _Marker:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    path = BeaverFolder(tmp_path / "beaver").write("bin")
    mark = tmp_path / "ran"
    torch.save({"score_head.weight": _Marker(mark)}, path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        load_score_model(path, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"score_dim": 2}, "score_dim"),
        ({"score_type": "both"}, "score_type"),
        ({"do_normalize": True}, "score_type"),
    ],
)
def test_wrong_config_field_is_named(tmp_path, fields, named):
    with pytest.raises(DataError, match=named):
        load_score_model(BeaverFolder(tmp_path / "b", **fields).write(), device="cpu")


def test_config_that_is_no_object(tmp_path):
    path = BeaverFolder(tmp_path / "beaver").write()
    (path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"config\.json"):
        load_score_model(path, device="cpu")
