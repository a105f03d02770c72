import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.agents.agent_files import load_agent, read_agent_spec, save_agent
from mara_rl.agents.published_actors import load_published_actor, save_published_actor
from mara_rl.cli.app import app
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.metrics.preference import preference_rate
from mara_rl.tracking.promotion import PromotionEvidence
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.store import tracking_uri
from mara_rl.tracking.tracking_run import TrackingRun

NAME = "mara-some-llm"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A MARA_HOME whose registry holds two versions: 1 beats the base LLM, 2 does not."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARA_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = tracking_uri(allow_local=True)
    with TrackingRun.start(uri, "cli", "run", {}) as run:
        for version, (wins, losses) in enumerate([(60, 20), (20, 60)], start=1):
            torch.manual_seed(version)
            agent = Agent(AgentSpec(hidden_size=4, head="anchored", llm="some/llm"))
            save_agent(agent, home / f"agent-{version}", metadata={"number": version})
            rate = preference_rate(np.repeat([1, -1], [wins, losses]))
            evidence = PromotionEvidence.from_rate(rate, against="base")
            model_uri = run.log_agent(home / f"agent-{version}")
            AgentRegistry(uri).register(NAME, model_uri, evidence.tags())
    return home


@pytest.fixture(autouse=True)
def settings(home, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(home))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["agents", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_promotion_refusal_and_force_in_turn():
    assert run("list") == f"{NAME}\t2\t–\n"
    refused = run("promote", NAME, "--version", "2")
    assert refused.startswith(f"{NAME} version 2 stays candidate: lower bound -")
    assert refused.count("\n") == 1
    assert run("promote", NAME, "--version", "1") == f"{NAME} version 1 is champion\n"
    assert run("list") == f"{NAME}\t2\t1\n"
    forced = run("promote", NAME, "--version", "2", "--force", "--reason", "a demonstration")
    assert forced == (
        f"{NAME} version 2 is champion, before it version 1 (forced: a demonstration)\n"
    )
    shown = [line.split("\t") for line in run("show", NAME).splitlines()]
    assert [line[:2] for line in shown] == [["2", "candidate, champion"], ["1", ""]]
    assert shown[1][2].startswith("+50.0 [+")
    assert shown[1][2].endswith("] (n=80) against base")
    assert "tag forced\ta demonstration\n" in run("show", f"models:/{NAME}@champion")


def test_a_spoilt_tag_stops_promotion_but_not_by_force(home):
    registry = AgentRegistry(tracking_uri(allow_local=True))
    spec = AgentSpec(hidden_size=4, head="anchored", llm="some/llm")
    save_agent(Agent(spec), home / "spoilt")
    with TrackingRun.start(registry.uri, "cli", "spoilt", {}) as logged:
        uri = logged.log_agent(home / "spoilt")
    registry.register("mara-spoilt", uri, {"preference.n": "many"})
    with pytest.raises(DataError, match=r"tag preference\.n: "):
        run("promote", "mara-spoilt", "--version", "1")
    forced = run("promote", "mara-spoilt", "--version", "1", "--force", "--reason", "known")
    assert forced == "mara-spoilt version 1 is champion (forced: known)\n"
    assert "hidden_size\t4\n" in run("show", uri), "as a run logged it"
    registry.tag("mara-spoilt", 1, PromotionEvidence(against="base", flaw="leaked").tags())
    assert run("show", "mara-spoilt").split("\t")[2] == "–"


def test_show_of_one_agent(home):
    for ref in (f"models:/{NAME}/1", str(home / "agent-1")):
        fields = dict(line.split("\t") for line in run("show", ref).splitlines())
        assert (fields["hidden_size"], fields["head"]) == ("4", "anchored")
        assert (fields["top_k"], fields["llm"]) == ("40", "some/llm")


def test_export_writes_the_same_agent(home, tmp_path):
    for number, ref in enumerate((f"models:/{NAME}/1", str(home / "agent-1"))):
        out = tmp_path / str(number)
        assert run("export", ref, "--out", str(out)) == f"wrote {ref} to {out}\n"
        exported, original = load_agent(out), load_agent(home / "agent-1")
        weights = exported.network.state_dict()
        for key, tensor in original.network.state_dict().items():
            assert torch.equal(weights[key], tensor)
        spec, metadata = read_agent_spec(out)
        assert spec == original.spec
        assert metadata == {"number": 1, "exported_from": ref}
    with pytest.raises(DataError, match="exists; expected a new one"):
        run("export", ref, "--out", str(out))


def test_export_of_a_published_actor(tmp_path):
    agent = Agent(AgentSpec(hidden_size=5, head="paper"))
    torch.save(agent.network.state_dict(), tmp_path / "x_1_1_actor.pth")
    run("export", str(tmp_path / "x_1_1_actor.pth"), "--out", str(tmp_path / "out"))
    spec = load_agent(tmp_path / "out").spec
    assert (spec.head, spec.rule, spec.fallback) == ("paper", "threshold", "first")


def test_wrong_calls(monkeypatch):
    with pytest.raises(DataError, match="mara-none"):
        run("show", "mara-none")
    with pytest.raises(DataError, match="version=9"):
        run("promote", NAME, "--version", "9")
    for options in (["--force"], ["--reason", "x"]):
        result = CliRunner().invoke(app, ["agents", "promote", NAME, "--version", "1", *options])
        assert result.exit_code == 2
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set, but RAY_ADDRESS is"):
        run("list")
    assert NAME in run("list", "--single-node")


@pytest.mark.slow
def test_a_server_that_is_away_is_one_line_and_exit_1(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-c", "from mara_rl.cli.app import main; main()", "agents", "list"],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: MLFLOW_TRACKING_URI http://***@127.0.0.1:9: no answer")
    assert result.stderr.count("\n") == 1


def test_a_published_actor_is_imported_as_candidate(tiny_llms, tmp_path):
    published = random_actor(32, tmp_path / "tiny_1_1_actor.pth")
    llm = str(tiny_llms["llama"])
    line = run("import", str(published), "--llm", llm, "--name", "mara-imported")
    assert line == "registered models:/mara-imported@candidate (version 1)\n"
    found = AgentRegistry(tracking_uri(allow_local=True)).resolve("models:/mara-imported@candidate")
    assert (found.spec.llm, found.spec.head, found.spec.rule) == (llm, "paper", "threshold")
    original = load_published_actor(published).network.state_dict()
    assert all(torch.equal(original[k], v) for k, v in found.network.state_dict().items())
    run("export", "models:/mara-imported@candidate", "--out", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"agent.safetensors", "agent.json", "README.md", "out_actor.pth"}
    assert "base_model" in (tmp_path / "out" / "README.md").read_text()


def test_an_import_keeps_what_the_folder_says(tiny_llms, tmp_path):
    spec = AgentSpec(hidden_size=32, head="relative", llm=str(tiny_llms["llama"]))
    save_agent(Agent(spec), tmp_path / "agent", metadata={"run": "mine", "seed": 3})
    run("import", str(tmp_path / "agent"), "--name", "mara-kept")
    run("export", "models:/mara-kept@candidate", "--out", str(tmp_path / "out"))
    _, metadata = read_agent_spec(tmp_path / "out")
    assert metadata == {
        "run": "mine",
        "seed": 3,
        "imported_from": str(tmp_path / "agent"),
        "exported_from": "models:/mara-kept@candidate",
    }


def test_an_import_that_does_not_fit_is_refused(tiny_llms, tmp_path):
    published = random_actor(12, tmp_path / "x_actor.pth")
    refused = CliRunner().invoke(app, ["agents", "import", str(published)])
    assert refused.exit_code == 2
    assert "give --llm" in refused.output
    with pytest.raises(DataError, match=r"hidden size 12; LLM .* has hidden size 32"):
        run("import", str(published), "--llm", str(tiny_llms["llama"]))
    with pytest.raises(DataError, match="no such file or folder"):
        run("import", "/no/such.pth", "--llm", str(tiny_llms["llama"]))


def random_actor(hidden_size, path):
    spec = AgentSpec(hidden_size=hidden_size, head="paper", rule="threshold", fallback="first")
    save_published_actor(Agent(spec), path)
    return path
