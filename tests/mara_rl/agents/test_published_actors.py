"""Published ``.pth`` actors: read as published, never run; written where that is what they are."""

import os
import random
import zipfile

import pytest
import torch
from small_agents import SIZE, logits, make_agent

from mara_rl.agents.agent_files import load_agent, save_agent
from mara_rl.agents.agent_refs import fetch_agent, load_local_agent
from mara_rl.agents.published_actors import load_published_actor, save_published_actor
from mara_rl.common.errors import ConfigError, DataError


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


@pytest.mark.parametrize("zipped", [True, False])
def test_whatever_is_cut_off_or_flipped_is_one_line(tmp_path, zipped):
    path = tmp_path / "actor.pth"
    torch.save({"ln.weight": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    draw = random.Random(0)
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] = draw.randrange(256)
        broken.append(bytes(flipped))
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"actor\.pth") as caught:  # never a whole actor
            load_published_actor(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0),
        torch.zeros(SIZE, dtype=torch.long),
        torch.zeros(SIZE).to_sparse(),
        torch.zeros(SIZE, device="meta"),
        torch.ones(SIZE).to(torch.float8_e4m3fn),
        torch.full((SIZE,), torch.nan),
    ],
)
def test_weights_that_are_no_plain_floats_are_refused(tmp_path, weight):
    path = tmp_path / "actor.pth"
    torch.save({**make_agent("paper").network.state_dict(), "ln.weight": weight}, path)
    with pytest.raises(DataError, match=r"ln\.weight"):
        load_published_actor(path)


def test_other_contents_of_a_published_file_are_named(tmp_path):
    path = tmp_path / "actor.pth"
    torch.save({"model.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"no vector 'ln\.weight'.*model\.weight"):
        load_published_actor(path)
    torch.save({"ln.weight": torch.zeros(2), 7: torch.zeros(1)}, path)
    with pytest.raises(DataError, match="does not hold named tensors"):
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


def test_an_actor_of_the_published_kind_goes_out_and_comes_back(tmp_path):
    agent = make_agent("paper", rule="threshold", fallback="first")
    save_published_actor(agent, tmp_path / "x_actor.pth")
    back = load_published_actor(tmp_path / "x_actor.pth")
    assert torch.equal(logits(back), logits(agent))
    with pytest.raises(DataError, match="exists"):
        save_published_actor(agent, tmp_path / "x_actor.pth")
    with pytest.raises(DataError, match="relative, argmax_induced, last"):
        save_published_actor(make_agent("relative"), tmp_path / "y_actor.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["x_actor.pth"]


def test_agents_are_fetched_by_path_or_hub_id(tmp_path, published, monkeypatch):
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(folder / name)

    folder = tmp_path / "hub"
    save_agent(make_agent(), folder)
    (folder / "m_actor.pth").write_bytes(published.read_bytes())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch_agent(str(published)).spec == load_local_agent(published).spec
    assert fetch_agent("some/agents").spec == load_agent(folder).spec
    assert fetch_agent("some/agents/m_actor.pth").spec.head == "paper"
    assert asked == [
        ("some/agents", "agent.json"),
        ("some/agents", "agent.safetensors"),
        ("some/agents", "m_actor.pth"),
    ]


@pytest.mark.parametrize("ref", ["nowhere", "./no/where", "/no/where/a.pth"])
def test_what_cannot_be_a_hub_id_is_a_missing_file(ref):
    with pytest.raises(DataError, match=f"{ref}.*no such file or folder"):
        fetch_agent(ref)


def test_a_hub_that_does_not_answer_is_named():
    with pytest.raises(ConfigError, match=r"'some/agents/x\.pth'.*model hub did not give x\.pth"):
        fetch_agent("some/agents/x.pth")  # the tests are offline
