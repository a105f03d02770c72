import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import agent_sha256, load_agent
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.metrics.preference import preference_rate
from mara_rl.tracking.promotion import PromotionEvidence
from mara_rl.tracking.registry import (
    AgentRegistry,
    model_name_for,
    resolve_agent,
    source_tags,
)
from mara_rl.tracking.store import mlflow_client
from mara_rl.tracking.tracking_run import TrackingRun


def evidence(wins: int, losses: int, champion: int | None = None) -> PromotionEvidence:
    rate = preference_rate(np.repeat([1, -1], [wins, losses]))
    against = "base" if champion is None else "champion"
    return PromotionEvidence.from_rate(rate, against=against, champion_version=champion)


def same(agent: Agent, folder: Path) -> bool:
    other = load_agent(folder)
    state, expected = agent.network.state_dict(), other.network.state_dict()
    return agent.spec == other.spec and all(torch.equal(state[k], expected[k]) for k in expected)


def log_and_register(uri: str, name: str, *folders: Path) -> list[tuple[str, int]]:
    """The run id and version of each agent, in runs of their own."""
    logged = []
    for folder in folders:
        with TrackingRun.start(uri, "registry", "run", {}) as run:
            model_uri = run.log_agent(folder)
        sha256 = agent_sha256(load_agent(folder))
        tags = source_tags(llm="some/llm", seed=0, run_id=run.run_id, sha256=sha256)
        logged.append((run.run_id, AgentRegistry(uri).register(name, model_uri, tags)))
    return logged


@pytest.fixture
def name(request) -> str:
    """A registered name of this test alone: tests share the server."""
    return model_name_for(request.node.name)


def test_every_kind_of_reference_resolves_to_its_agent(uri, name, make_agent):
    first, second = make_agent(1), make_agent(2, head="paper")
    (run_1, version_1), (run_2, version_2) = log_and_register(uri, name, first, second)
    registry = AgentRegistry(uri)
    assert (version_1, version_2) == (1, 2)
    assert same(registry.resolve(f"models:/{name}/1"), first)
    assert same(registry.resolve(f"models:/{name}/2"), second)
    assert same(registry.resolve(f"models:/{name}@candidate"), second)
    assert same(registry.resolve(f"runs:/{run_1}/agent"), first)
    assert same(registry.resolve(f"runs:/{run_2}/agent"), second)
    assert same(registry.resolve(str(first)), first)


def test_a_plain_agent_folder_among_a_runs_files_resolves(uri, make_agent):
    folder = make_agent()
    with TrackingRun.start(uri, "registry", "run", {}) as run:
        run.log_artifacts(folder, "kept/agent")
    assert same(AgentRegistry(uri).resolve(f"runs:/{run.run_id}/kept/agent"), folder)


def test_code_that_lies_in_the_registry_is_not_run(sqlite_uri, name, make_agent, tmp_path):
    folder = make_agent()
    log_and_register(sqlite_uri, name, folder)
    (code,) = tmp_path.glob("mlflow-artifacts/**/agent_pyfunc.py")
    code.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    assert same(AgentRegistry(sqlite_uri).resolve(f"models:/{name}@candidate"), folder)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("models:/mara-none@champion", "mara-none"),
        ("models:/{name}@champion", "champion not found"),
        ("models:/{name}/99", "version=99"),
        ("models:/{name}", "expected models:/name@alias or models:/name/version"),
        ("runs:/nothere/agent", "nothere"),
        ("runs:/{run}", "expected runs:/<run id>/<path>"),
        ("runs:/{run}/other", "expected an agent"),
        ("/no/such/folder", "no such file or folder"),
    ],
)
def test_references_to_nothing_are_named(sqlite_uri, name, make_agent, ref, message):
    ((run_id, _),) = log_and_register(sqlite_uri, name, make_agent())
    with pytest.raises(DataError, match=message) as caught:
        AgentRegistry(sqlite_uri).resolve(ref.format(name=name, run=run_id))
    assert "\n" not in str(caught.value)


def test_a_damaged_artifact_is_refused(sqlite_uri, name, make_agent, tmp_path):
    log_and_register(sqlite_uri, name, make_agent())
    (weights,) = tmp_path.glob("mlflow-artifacts/**/agent.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"agent\.safetensors could not be read"):
        AgentRegistry(sqlite_uri).resolve(f"models:/{name}@candidate")


def test_only_logged_agents_can_be_registered(sqlite_uri, name):
    registry = AgentRegistry(sqlite_uri)
    with pytest.raises(DataError, match="expected models:/m-…"):
        registry.register(name, "runs:/abc/agent", {})
    with pytest.raises(DataError, match="m-0123"):
        registry.register(name, "models:/m-0123", {})


def test_listing_shows_agents_alone_with_their_aliases(uri, name, make_agent):
    log_and_register(uri, name, make_agent(1), make_agent(2))
    mlflow_client(uri).create_registered_model(f"other-{name}")
    registry = AgentRegistry(uri)
    assert registry.champion(name) is None
    registry.promote(name, 1, evidence=evidence(60, 20))
    listed = {agent.name: agent for agent in registry.list()}
    assert f"other-{name}" not in listed
    assert (listed[name].candidate, listed[name].champion) == (2, 1)
    versions = registry.show(name)
    assert [(v.version, v.aliases) for v in versions] == [(2, ("candidate",)), (1, ("champion",))]
    assert versions[0].tags["llm"] == "some/llm"
    assert versions[0].tags["run_id"] == versions[0].run_id
    assert registry.find(f"models:/{name}@champion") == versions[1]
    with pytest.raises(DataError, match="mara-none"):
        registry.show("mara-none")
    assert registry.champion("mara-none") is None


def test_the_gate_promotes_against_base_then_against_the_champion(uri, name, make_agent):
    folders = [make_agent(seed) for seed in range(3)]
    log_and_register(uri, name, *folders)
    registry = AgentRegistry(uri)

    refused = registry.promote(name, 1, evidence=evidence(40, 38))
    assert not refused.promoted
    assert refused.line.startswith(f"{name} version 1 stays candidate: lower bound -")
    assert registry.champion(name) is None
    recorded = registry.find(f"models:/{name}/1").tags
    assert PromotionEvidence.from_tags(recorded) == evidence(40, 38)

    first = registry.promote(name, 1, evidence=evidence(60, 20))
    assert first.promoted
    assert first.line == f"{name} version 1 is champion"
    assert registry.promote(name, 1, evidence=None).line.endswith("is champion already")

    refused = registry.promote(name, 2, evidence=evidence(60, 20))
    assert refused.line.endswith("compared with the base LLM; expected the champion, version 1")
    assert registry.champion(name) == 1

    second = registry.promote(name, 2, evidence=evidence(60, 20, champion=1))
    assert second.line == f"{name} version 2 is champion, before it version 1"
    assert same(registry.resolve(f"models:/{name}@champion"), folders[1])
    assert registry.find(f"models:/{name}/2").tags["promoted_over"] == "1"

    stale = registry.promote(name, 3, evidence=evidence(60, 20, champion=1))
    assert stale.line.endswith("compared with version 1; expected the champion, version 2")


def test_what_a_run_registered_before_it_was_cut_off_is_found_again(uri, name, make_agent):
    first, second = make_agent(1), make_agent(2)
    sha256 = agent_sha256(load_agent(first))
    registry = AgentRegistry(uri)
    assert registry.registered(name, run_id="0123", sha256=sha256) is None, "no such agent yet"
    (run_1, _), (run_2, _) = log_and_register(uri, name, first, second)
    assert registry.registered(name, run_id=run_1, sha256=sha256) == 1
    assert registry.registered(name, run_id=run_2, sha256=sha256) is None, "other weights"
    assert registry.find(f"models:/{name}@candidate").version == 2, "a newer one stays"

    mlflow_client(uri).delete_registered_model_alias(name, "candidate")  # killed before it was set
    other = agent_sha256(load_agent(second))
    assert registry.registered(name, run_id=run_2, sha256=other) == 2
    assert registry.find(f"models:/{name}@candidate").version == 2


def test_force_rolls_back_and_keeps_the_reason(uri, name, make_agent):
    folders = [make_agent(seed) for seed in range(2)]
    log_and_register(uri, name, *folders)
    registry = AgentRegistry(uri)
    registry.promote(name, 1, evidence=evidence(60, 20))
    registry.promote(name, 2, evidence=evidence(60, 20, champion=1))
    with pytest.raises(ConfigError, match="reason is empty"):
        registry.promote(name, 1, evidence=None, force_reason="  ")
    assert registry.champion(name) == 2
    back = registry.promote(name, 1, evidence=None, force_reason="version 2 refuses too much")
    assert back.line == (
        f"{name} version 1 is champion, before it version 2 (forced: version 2 refuses too much)"
    )
    assert same(registry.resolve(f"models:/{name}@champion"), folders[0])
    tags = registry.find(f"models:/{name}/1").tags
    assert tags["forced"] == "version 2 refuses too much"
    assert PromotionEvidence.from_tags(tags) == evidence(60, 20)
    registry.promote(name, 2, evidence=evidence(60, 20, champion=1))
    assert registry.promote(name, 1, evidence=evidence(60, 20, champion=2)).promoted
    assert registry.find(f"models:/{name}/1").tags["forced"] == "", "not any more"


def test_tags_replace_those_of_the_same_kind(uri, name, make_agent):
    log_and_register(uri, name, make_agent())
    registry = AgentRegistry(uri)
    registry.tag(name, 1, {"figures.a": "1", "figures.b": "2", "other": "3"})
    registry.tag(name, 1, {"figures.a": "4"}, instead_of="figures.")
    tags = registry.find(f"models:/{name}/1").tags
    assert (tags["figures.a"], tags["other"], "figures.b" in tags) == ("4", "3", False)


def test_a_registered_name_may_look_like_that_of_a_logged_model(uri, name, make_agent):
    folder = make_agent()
    with TrackingRun.start(uri, "registry", "run", {}) as run:
        logged = run.log_agent(folder)
    registry = AgentRegistry(uri)
    registry.register(f"m-{name}", logged, {})
    for ref in (f"models:/m-{name}@candidate", f"models:/m-{name}/1", logged):
        assert same(registry.resolve(ref), folder)
    with pytest.raises(DataError, match="expected models:/name@alias or models:/name/version"):
        registry.resolve(f"models:/m-{name}")


def test_an_unknown_version_is_not_promoted(sqlite_uri, name, make_agent):
    log_and_register(sqlite_uri, name, make_agent())
    with pytest.raises(DataError, match="version=5"):
        AgentRegistry(sqlite_uri).promote(name, 5, evidence=evidence(60, 20))


def test_a_server_that_is_away_is_retryable(monkeypatch):
    monkeypatch.setattr("mara_rl.tracking.store._RETRIES", 0)
    with pytest.raises(RetryableError, match=r"cannot serve.*refused"):
        AgentRegistry("http://127.0.0.1:9").list()


@pytest.mark.parametrize(
    ("llm", "expected"),
    [
        ("smollm2-135m-instruct", "mara-smollm2-135m-instruct"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mara-mistralai-mistral-7b-instruct-v0.3"),
        ("/data/models/Gemma 2", "mara-gemma-2"),
        ("./models/here/", "mara-here"),
        ("a:b//c", "mara-a-b-c"),
    ],
)
def test_names_have_neither_slash_nor_colon(llm, expected):
    assert model_name_for(llm) == expected


def test_a_name_without_letters_is_refused():
    with pytest.raises(ConfigError, match="llm '///…'"):
        model_name_for("///…")


def test_the_commit_of_this_code_is_a_tag():
    tags = source_tags(llm="x", seed=3, run_id="r", sha256="s")
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    if git.returncode == 0:
        assert tags.pop("git_sha").removesuffix("-dirty") == git.stdout.strip()
    assert tags == {"llm": "x", "seed": "3", "run_id": "r", "sha256": "s"}


def test_local_references_need_no_mlflow(make_agent, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    folder = make_agent()
    assert same(resolve_agent(str(folder), allow_local=False), folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        resolve_agent("models:/mara-x@champion", allow_local=False)
