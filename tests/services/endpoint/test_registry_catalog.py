"""Names of agents: aliases that move, versions, an MLflow that goes away."""

import logging
import time
from pathlib import Path

import pytest
import torch

from mara_rl.agents.agent_files import load_agent
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.llm.policy_llm import load_policy_llm
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.store import mlflow_client
from mara_rl.tracking.tracking_run import TrackingRun
from services.endpoint.registry_catalog import RegistryCatalog, served_name

NAME = "mara-llm"


@pytest.fixture(scope="module")
def llm(tiny_llms):
    llm = load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")
    llm.name = "some/llm"
    return llm


def register(uri: str, folder: Path, *, name: str = NAME, llm: str = "some/llm") -> int:
    with TrackingRun.start(uri, "registry", "run", {}) as run:
        logged = run.log_agent(folder)
    return AgentRegistry(uri).register(name, logged, {"llm": llm} if llm else {})


def make_champion(uri: str, version: int, name: str = NAME) -> None:
    mlflow_client(uri).set_registered_model_alias(name, "champion", str(version))


@pytest.fixture
def open_catalog(llm):
    catalogs = []

    def make(uri: str | None, *, poll_s: float = 0.1, **options: object) -> RegistryCatalog:
        registry = AgentRegistry(uri) if uri else None
        catalogs.append(RegistryCatalog(llm, {}, registry, created=5, poll_s=poll_s, **options))
        return catalogs[-1]

    yield make
    for catalog in catalogs:
        catalog.close()


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same(served, folder: Path) -> bool:
    state, expected = served.agent.network.state_dict(), load_agent(folder).network.state_dict()
    return all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_moved_alias_is_followed_and_what_was_given_out_stays(
    sqlite_uri, make_agent, open_catalog
):
    first, second = make_agent(1, hidden_size=32), make_agent(2, hidden_size=32)
    assert register(sqlite_uri, first) == 1
    make_champion(sqlite_uri, 1)
    catalog = open_catalog(sqlite_uri)
    assert [name for name, _ in catalog.names()] == [f"{NAME}@candidate", f"{NAME}@champion"]
    before = catalog.loaded(f"{NAME}@champion")
    assert before.version == f"{NAME}/1"
    assert before.created > 1.7e9
    assert same(before, first)
    assert catalog.loaded(f"{NAME}@candidate") is before  # one version, one agent
    register(sqlite_uri, second)
    make_champion(sqlite_uri, 2)
    until(lambda: catalog.loaded(f"{NAME}@champion").version == f"{NAME}/2")
    assert same(catalog.loaded(f"{NAME}@champion"), second)
    assert same(before, first)
    mlflow_client(sqlite_uri).delete_registered_model_alias(NAME, "champion")
    until(lambda: catalog.loaded(f"{NAME}@champion") is None)


def test_any_version_can_be_asked_for(sqlite_uri, make_agent, open_catalog):
    folders = [make_agent(seed, hidden_size=32) for seed in (1, 2)]
    for folder in folders:
        register(sqlite_uri, folder)
    catalog = open_catalog(sqlite_uri)
    assert catalog.loaded(f"{NAME}/1") is None
    found = catalog.load(f"{NAME}/1")
    assert same(found, folders[0])
    assert catalog.loaded(f"{NAME}/1") is found
    assert catalog.load(f"{NAME}/1") is found
    for unknown in (f"{NAME}/7", f"{NAME}@champion", "nobody/1", "nobody", "a/b/c", f"{NAME}@x"):
        with pytest.raises(DataError, match=f"model '{unknown}' does not exist"):
            catalog.load(unknown)


def test_agents_of_other_llms_are_not_listed_and_refused(sqlite_uri, make_agent, open_catalog):
    other, small = make_agent(1, hidden_size=32), make_agent(2, hidden_size=8)
    register(sqlite_uri, other, name="mara-other", llm="some/other")
    register(sqlite_uri, small, name="mara-small")
    register(sqlite_uri, other, name="mara-untold", llm="")
    catalog = open_catalog(sqlite_uri)
    # The last one does not say by its tags; the agent itself does.
    assert [name for name, _ in catalog.names()] == ["mara-untold@candidate"]
    with pytest.raises(DataError, match="hidden size 8; LLM 'some/llm' has hidden size 32"):
        catalog.load("mara-small/1")


@pytest.mark.slow
def test_while_mlflow_is_away_loaded_agents_go_on(
    own_server, make_agent, open_catalog, monkeypatch, caplog
):
    monkeypatch.setattr("mara_rl.tracking.store._RETRIES", 0)
    register(own_server.uri, make_agent(1, hidden_size=32))
    catalog = open_catalog(own_server.uri)
    name = f"{NAME}@candidate"
    served = catalog.loaded(name)
    own_server.kill()
    with caplog.at_level(logging.WARNING):
        until(lambda: catalog._away is not None)
    assert "loaded agents go on" in caplog.text
    assert catalog.loaded(name) is served
    assert [listed for listed, _ in catalog.names()] == [name]
    with pytest.raises(RetryableError, match="is not loaded, and the registry is away"):
        catalog.load(f"{NAME}/9")
    own_server.start()
    until(lambda: catalog._away is None)
    register(own_server.uri, make_agent(2, hidden_size=32))
    until(lambda: catalog.loaded(name).version == f"{NAME}/2")


def test_a_registry_that_is_away_at_the_start_does_not_stop_it(open_catalog, monkeypatch):
    monkeypatch.setattr("mara_rl.tracking.store._RETRIES", 0)
    catalog = open_catalog("http://127.0.0.1:9")
    assert catalog.names() == []


def test_fixed_agents_need_no_registry(llm, make_agent):
    folder = make_agent(1, hidden_size=32)
    catalog = RegistryCatalog(llm, {"mine": lambda: load_agent(folder)}, None, created=5)
    assert [name for name, _ in catalog.names()] == ["mine"]
    assert same(catalog.loaded("mine"), folder)
    assert catalog.loaded("mine").created == 5
    with pytest.raises(DataError, match="'mara-llm/1' does not exist; agents are: mine"):
        catalog.load(f"{NAME}/1")
    catalog.close()
    small = make_agent(2, hidden_size=8)
    with pytest.raises(DataError, match="hidden size 8"):
        RegistryCatalog(llm, {"small": lambda: load_agent(small)}, None, created=5)


def test_versions_nobody_needs_are_given_up(sqlite_uri, make_agent, open_catalog, monkeypatch):
    monkeypatch.setattr("services.endpoint.registry_catalog._MAX_VERSIONS", 1)
    folder = make_agent(1, hidden_size=32)
    for _ in range(4):
        register(sqlite_uri, folder)
    catalog = open_catalog(sqlite_uri)
    for version in (1, 2, 3):
        catalog.load(f"{NAME}/{version}")
    assert catalog.loaded(f"{NAME}/1") is None
    assert catalog.loaded(f"{NAME}/3") is not None
    assert catalog.loaded(f"{NAME}@candidate").version == f"{NAME}/4"


@pytest.mark.parametrize(
    ("ref", "name", "rest"),
    [
        ("models:/mara-x@champion", "mara-x@champion", "models:/mara-x@champion"),
        ("models:/mara-x/3", "mara-x/3", "models:/mara-x/3"),
        ("runs/quickstart-1/agent", "quickstart-1", "runs/quickstart-1/agent"),
        ("runs/quickstart-1/agent/", "quickstart-1", "runs/quickstart-1/agent/"),
        ("mistral_v3_2_1_actor.pth", "mistral_v3_2_1_actor", "mistral_v3_2_1_actor.pth"),
        ("mine=./somewhere/agent", "mine", "./somewhere/agent"),
        ("runs:/abc/agent", "abc", "runs:/abc/agent"),
    ],
)
def test_names_to_serve_agents_by(ref, name, rest):
    assert served_name(ref) == (name, rest)


@pytest.mark.parametrize("ref", ["agent", "", "=x", "a b=x", "mine="])
def test_agents_without_a_name_to_serve_them_by(ref):
    with pytest.raises(ConfigError, match="name=REF"):
        served_name(ref)
