import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from mara_rl.agent import Agent, AgentSpec
from mara_rl.agent_files import (
    load_agent,
    load_local_agent,
    load_published_actor,
    read_agent_spec,
    save_agent,
)
from mara_rl.errors import DataError

SIZE = 12


def make_agent(head: str = "relative", **fields) -> Agent:
    torch.manual_seed(0)
    agent = Agent(AgentSpec(hidden_size=SIZE, head=head, llm="some/llm", **fields))
    torch.nn.init.normal_(agent.network.output_linear.weight)
    return agent


def logits(agent: Agent) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    h, prefix = torch.randn(2, 7, SIZE, generator=generator)
    with torch.inference_mode():
        return agent.accept_logit(h, torch.linspace(-2, 2, 7), prefix)


@pytest.fixture
def saved(tmp_path):
    save_agent(make_agent(), tmp_path / "agent", metadata={"seed": 3})
    return tmp_path / "agent"


@pytest.mark.parametrize("head", ["paper", "anchored", "relative"])
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
        ({"agent": {"head": "paper"}}, "agent.hidden_size: Field required"),
        ({"agent": {"hidden_size": SIZE, "head": "paper", "k": 1}}, "agent.k: Extra inputs"),
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


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "model_1_1_actor.pth"
    torch.save(make_agent("paper").network.state_dict(), path)
    return path


def test_a_published_actor_gets_the_published_rules(published):
    agent = load_published_actor(published)
    spec = agent.spec
    assert (spec.hidden_size, spec.head, spec.rule, spec.fallback) == (
        SIZE,
        "paper",
        "threshold",
        "first",
    )
    assert (spec.top_k, spec.top_p, spec.llm) == (40, 0.95, "")
    assert torch.equal(logits(agent), logits(make_agent("paper")))
    assert load_local_agent(published).spec == spec


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_published_file_is_named_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "was-run"))
    path = tmp_path / "actor.pth"
    torch.save({"ln.weight": Payload()}, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    with pytest.raises(DataError, match=r"holds the Python object posix\.mkdir; expected tensors"):
        load_published_actor(path)
    assert not (tmp_path / "was-run").exists()


def test_a_truncated_published_file_is_refused(published):
    published.write_bytes(published.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"actor\.pth") as caught:
        load_published_actor(published)
    assert "\n" not in str(caught.value)
    published.write_bytes(b"not a torch file")
    with pytest.raises(DataError, match="truncated or not a torch file"):
        load_published_actor(published)
    published.write_bytes(b"")
    with pytest.raises(DataError, match=r"actor\.pth"):
        load_published_actor(published)


def test_other_contents_of_a_published_file_are_named(tmp_path):
    path = tmp_path / "actor.pth"
    torch.save({"model.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"no vector 'ln\.weight'.*model\.weight"):
        load_published_actor(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(DataError, match="does not hold named tensors"):
        load_published_actor(path)
    state = make_agent("paper").network.state_dict()
    torch.save({**state, "output_linear.weight": torch.zeros(1, 256)}, path)
    with pytest.raises(DataError, match=r"'output_linear.weight' has shape \(1, 256\); expected"):
        load_published_actor(path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_local_agent(tmp_path / "none.pth")
