"""Agent folders: whole or not at all, and every fault of one named."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_agents import SIZE, logits, make_agent

from mara_rl.agents.agent_files import agent_sha256, load_agent, read_agent_spec, save_agent
from mara_rl.common.errors import DataError


@pytest.fixture
def saved(tmp_path):
    save_agent(make_agent(), tmp_path / "agent", metadata={"seed": 3})
    return tmp_path / "agent"


@pytest.mark.parametrize("head", ["paper", "anchored", "relative", "advantage"])
def test_a_saved_agent_comes_back_the_same(tmp_path, head):
    agent = make_agent(head, rule="sample", fallback="first", top_k=7, top_p=0.5)
    save_agent(agent, tmp_path / "new" / "agent", metadata={"note": "ä"})
    loaded = load_agent(tmp_path / "new" / "agent")
    assert loaded.spec == agent.spec
    assert torch.equal(logits(loaded), logits(agent))
    assert read_agent_spec(tmp_path / "new" / "agent") == (agent.spec, {"note": "ä"})


def test_weights_are_float32_under_the_published_keys(tmp_path):
    save_agent(make_agent().to(torch.bfloat16), tmp_path / "agent")
    weights = load_file(tmp_path / "agent" / "agent.safetensors")
    layers = ("ln", "linear1", "linear2", "output_linear")
    assert set(weights) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_folders_may_be_text(tmp_path):
    agent = make_agent()
    save_agent(agent, str(tmp_path / "agent"))
    assert agent_sha256(load_agent(str(tmp_path / "agent"))) == agent_sha256(agent)


def test_the_sha256_is_of_the_spec_in_a_fixed_order_and_the_weights():
    agent = make_agent("relative", exact=True, top_k=7, top_p=0.5)
    digest = hashlib.sha256(
        f'{{"hidden_size":{SIZE},"head":"relative","rule":"argmax_induced","fallback":"last",'
        '"exact":true,"top_k":7,"top_p":0.5,"llm":"some/llm"}'.encode()
    )
    for key, tensor in sorted(agent.network.state_dict().items()):
        digest.update(key.encode() + tensor.detach().numpy().tobytes())
    assert agent_sha256(agent) == digest.hexdigest()


def test_loading_leaves_the_global_generator_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_agent(saved)
    assert torch.equal(torch.rand(3), expected)


def test_a_loaded_agent_can_be_trained_on(saved):
    agent = load_agent(saved)
    agent.accept_logit(torch.ones(SIZE), torch.tensor(0.0), torch.zeros(SIZE)).backward()
    assert agent.network.linear1.weight.grad is not None


def test_an_existing_folder_is_not_touched(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(DataError, match="exists; expected a new one"):
        save_agent(make_agent("paper"), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}])
def test_metadata_that_is_not_json_leaves_nothing_behind(tmp_path, bad):
    with pytest.raises(DataError, match="metadata cannot be written as JSON"):
        save_agent(make_agent(), tmp_path / "agent", metadata=bad)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_rename(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", no_rename)
    with pytest.raises(OSError, match="disk full"):
        save_agent(make_agent(), tmp_path / "agent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["agent.json", "agent.safetensors"])
def test_a_missing_or_torn_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{name} could not be read"):
        load_agent(saved)
    (saved / name).unlink()
    with pytest.raises(DataError, match=f"{name} could not be read"):
        load_agent(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; expected 1"),
        ({"agent": {"hidden_size": SIZE, "head": "other"}}, "agent.head: .* not 'other'"),
        ({"agent": {"head": "paper"}}, "agent.hidden_size: missing"),
        ({"agent": {"hidden_size": SIZE, "head": "paper", "k": 1}}, "unknown key 'agent.k'"),
        ({"metadata": 3}, "metadata is 3; expected a mapping"),
    ],
)
def test_a_wrong_field_of_agent_json_is_named(saved, change, message):
    content = json.loads((saved / "agent.json").read_text())
    (saved / "agent.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message) as caught:
        load_agent(saved)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_spec_are_named_with_both_shapes(saved):
    content = json.loads((saved / "agent.json").read_text())
    content["agent"]["hidden_size"] = 99
    (saved / "agent.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shape \(1024, 12\); expected \(1024, 99\).*size 99"):
        load_agent(saved)


@pytest.mark.parametrize("key", ["ln.bias", "critic.weight"])
def test_missing_and_unknown_weights_are_named(saved, key):
    path = saved / "agent.safetensors"
    weights = load_file(path)
    if key in weights:
        del weights[key]
    else:
        weights[key] = torch.zeros(2)
    save_file(weights, path)
    with pytest.raises(DataError, match=key):
        load_agent(saved)


def test_weights_that_are_not_finite_are_refused(saved):
    path = saved / "agent.safetensors"
    weights = load_file(path)
    weights["linear2.bias"][3] = float("nan")
    save_file(weights, path)
    with pytest.raises(DataError, match=r"'linear2.bias' is not all finite"):
        load_agent(saved)
