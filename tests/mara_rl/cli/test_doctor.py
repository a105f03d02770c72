import importlib.metadata
import json
import socket

import pytest
from typer.testing import CliRunner

from mara_rl.cli import doctor
from mara_rl.cli.app import app
from mara_rl.llm.policy_llm import smollm2_gguf


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def settings(home, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(home))
    for name in ("MARA_REDIS_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def findings(*args: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status, and state and detail of each thing looked at."""
    result = CliRunner().invoke(app, ["doctor", *args], catch_exceptions=False)
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    return result.exit_code, {name: (state, detail) for state, name, detail in rows}


@pytest.fixture
def write_config(tmp_path):
    """A config file with score models of its own."""

    def write(**changes) -> str:
        model = tmp_path / "score-model"
        model.mkdir(exist_ok=True)
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": "hello"}) + "\n")
        config = {
            "llm": {"name": "smollm2-135m-instruct"},
            "prompts": {"train": str(prompts)},
            "scores": {"reward": {"model": str(model), "weight": 1.0, "num_cpus": 0.1}},
            "rollouts": {"num_cpus": 0.5},
            "ppo": {"iterations": 1, "kl_coeff": 0.1},
        } | changes
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(config))
        return str(path)

    return write


@pytest.mark.slow
def test_a_machine_that_has_everything_a_config_needs(write_config, home):
    status, found = findings("--config", write_config())
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert status == 0
    assert found["torch"][1] == importlib.metadata.version("torch")
    assert "CPU cores" in found["devices"][1]
    assert found["Redis"][1].endswith("embedded (MARA_REDIS_URL is not set)")
    assert str(home) in found["MLflow"][1]
    assert found["LLM"][1].endswith(".gguf")
    assert found["prompts train"][1].startswith("1, ")
    assert found["prompts heldout"][1].endswith(", packaged")
    assert found["resources"][1].startswith("asks for 0.6 CPU")
    _, found = findings("--config", write_config(llm={"name": str(smollm2_gguf())}))
    assert found["LLM"] == ("ok", f"{smollm2_gguf()}: hidden size 576")


def test_every_missing_thing_has_a_line_of_its_own(write_config, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("MARA_REDIS_URL", f"redis://:secret@127.0.0.1:{port}/0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    config = write_config(
        llm={"name": "no-such-llm"},
        prompts={"train": str(tmp_path / "none.jsonl")},
        scores={"reward": {"model": "no-such-model", "weight": 1.0}},
        rollouts={"num_cpus": 1000},
    )
    status, found = findings("--config", config)
    assert status == 1
    missing = {name: detail for name, (state, detail) in found.items() if state == "missing"}
    assert set(missing) == {
        "Redis",
        "MLflow",
        "LLM",
        "prompts train",
        "score model no-such-model",
        "resources",
    }
    assert "secret" not in json.dumps(missing)
    assert "refused" in missing["MLflow"]
    assert "neither a shipped name (smollm2-135m-instruct), nor a folder" in missing["LLM"]
    assert missing["prompts train"].endswith("none.jsonl: no such file")
    assert "1000" in missing["resources"]


def test_a_config_that_is_wrong_is_a_finding(write_config):
    status, found = findings("--config", write_config(seed=-1))
    assert status == 1
    assert found["config"][0] == "missing"
    assert "seed" in found["config"][1]
    assert "LLM" not in found


def test_in_a_cluster_services_of_this_machine_do_not_count(write_config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    status, found = findings("--config", write_config())
    assert status == 1
    assert found["Redis"][1].startswith("MARA_REDIS_URL is not set")
    assert found["MLflow"][1].startswith("MLFLOW_TRACKING_URI is not set")
    assert found["resources"] == ("ok", "asks the cluster for 0.6 CPU + 0 GPU")


def test_a_package_of_another_version_is_named(monkeypatch):
    real = importlib.metadata.version
    versions = {"ray": "2.9.0"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    finding = doctor._look("ray", doctor._package, "ray")
    assert not finding.ok
    assert finding.detail == "2.9.0; expected ==2.60.0: run `make setup`"
    assert not doctor._look("x", doctor._package, "no-such-package").ok


def test_score_models_that_should_come_with_the_package_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("mara_rl.score_models.loading.SHIPPED_FOLDER", tmp_path)
    status, found = findings()
    assert status == 1
    for name in ("smollm2-reward", "smollm2-cost"):
        state, detail = found[f"score model {name}"]
        assert state == "missing"
        assert "none installed" in detail
