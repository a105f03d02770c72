"""``mara-rl status`` on one machine: what there is, and what cannot be reached."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoints import serving
from local_cluster import free_ports

from mara_rl.cli import app
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.tracking.store import tracking_uri
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import load_config
from mara_rl.training.run.checkpoint import STATE_FILE, TrainState, save_checkpoint
from mara_rl.training.run.run_folder import RunFolder, RunOutcome, remove_folder
from mara_rl.training.run.run_names import EXPERIMENT, queue_name
from services.cluster.redis_server import connect, embedded_redis
from services.http.api_keys import ApiKeys
from services.prompt_queue.prompt_queue import PromptQueue
from services.scoring.score_api import create_score_api

Status = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MARA_REDIS_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Status:
    """Runs ``mara-rl status …``; exit status, output, error output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mara-rl", "status", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def make_run(home: Path) -> RunFolder:
    """A run that has a checkpoint, metrics and a queue with one prompt being answered."""
    config = load_config("quickstart")
    folder = RunFolder.named("mine", config)
    uri = tracking_uri(allow_local=True)
    with TrackingRun.start(uri, EXPERIMENT, "mine", {}) as tracking:
        for iteration in (1, 2):
            figures = {"rollout/reward": iteration / 2, "time/iteration_s": 9.0}
            tracking.log_metrics(figures, step=iteration)
    folder.mlflow_run_id = tracking.run_id
    state = TrainState(iteration=2)
    save_checkpoint(folder.checkpoints, state, {}, keep=2)
    with embedded_redis(home / "redis") as url, connect(url) as client:
        queue = PromptQueue(client, queue_name(config, "mine", tracking.run_id))
        queue.push([PromptRecord(f"p{i}", f"Prompt {i}?", {}) for i in range(3)])
        [prompt] = queue.read("runner-1", 1)
        queue.reject(queue.read("runner-1", 1)[0].entry_id, "too long")
        assert prompt.text
    return folder


def test_all_of_a_run_that_was_stopped(home: Path, status: Status) -> None:
    make_run(home)
    code, out, _ = status("mine", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["state"] == "stopped"
    assert found["checkpoint"]["iteration"] == 2
    assert found["tracking"]["iteration"] == 2
    assert found["tracking"]["metrics"]["rollout/reward"] == 1.0
    assert 0 <= found["tracking"]["age_s"] < 600
    queue = found["queue"]
    assert (queue["prompts"], queue["epoch"], queue["waiting"], queue["dead"]) == (3, 0, 1, 1)
    assert queue["pending"]["runner-1"][0] == 1
    assert found["ray"] is None
    assert list(found["unreachable"]) == ["Ray"]
    assert "answers that run's process only" in found["unreachable"]["Ray"]

    code, out, _ = status("mine")
    rows = dict(line.split("\t") for line in out.splitlines())
    assert code == 0
    assert rows["state"] == "stopped"
    assert rows["checkpoint"].startswith("iteration 2, ")
    assert rows["dead letters"] == "1"
    assert rows["rollout/reward"] == "1"
    assert rows["Ray not reachable"] == found["unreachable"]["Ray"]


def test_torn_checkpoints_are_told_and_the_newest_whole_one_is_shown(
    home: Path, status: Status
) -> None:
    folder = make_run(home)
    for name, text in (("000003", "{"), ("000004", None)):
        torn = folder.checkpoints / name
        torn.mkdir()
        if text is not None:
            (torn / STATE_FILE).write_text(text)
    code, out, _ = status("mine", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["checkpoint"]["iteration"] == 2
    assert set(found["torn_checkpoints"]) == {"000003", "000004"}
    _, out, _ = status("mine")
    assert "torn checkpoint 000004\tno state.json" in out
    [whole] = (p for p in folder.checkpoints.iterdir() if p.name not in found["torn_checkpoints"])
    remove_folder(whole)
    _, out, _ = status("mine", "--json")
    assert (json.loads(out)["checkpoint"], json.loads(out)["state"]) == (None, "stopped")


def test_score_services_by_url_are_asked(
    home: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARA_SCORE_KEY", "a-key-of-this-test")
    [port] = free_ports(1)

    async def score(pairs: list[tuple[str, str]]) -> list[float]:
        return [0.0 for _ in pairs]

    api = create_score_api(score, "smollm2-reward", ApiKeys(["a-key-of-this-test"]))
    with serving(api) as url:
        gone = f"http://127.0.0.1:{port}"
        RunFolder.named(
            "mine",
            load_config("quickstart", [f"scores.reward.url={url}", f"scores.cost.url={gone}"]),
        )
        _, out, _ = status("mine", "--json")
        assert json.loads(out)["url_scores"] == {url: "smollm2-reward"}
        _, out, _ = status("mine")
        rows = dict(line.split("\t") for line in out.splitlines())
        assert rows[f"score service {url}"] == "smollm2-reward"
        assert "ConnectError" in rows[f"{gone} not reachable"]


def test_a_run_is_training_while_a_process_has_it_and_done_at_its_end(
    home: Path, status: Status
) -> None:
    folder = RunFolder.named("mine", load_config("quickstart"))
    assert json.loads(status("mine", "--json")[1])["state"] == "not begun"
    with folder.claimed():
        assert json.loads(status("mine", "--json")[1])["state"] == "training"
    line = "preference rate: +1.0 [-2.0, +3.0] (n=9)"
    folder.finish(RunOutcome(run="mine", agent_uri="models:/mara-x/4", preference_rate=line))
    code, out, _ = status("mine")
    assert code == 0
    rows = dict(row.split("\t") for row in out.splitlines())
    assert (rows["state"], rows["agent"], rows["result"]) == ("done", "models:/mara-x/4", line)
    assert rows["queue"] == "none yet"


def test_what_does_not_answer_is_named(
    home: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.named("mine", load_config("quickstart")).mlflow_run_id = "0" * 32
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("MARA_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    code, out, _ = status("mine", "--json")
    assert code == 0
    unreachable = json.loads(out)["unreachable"]
    assert unreachable.keys() == {"Redis", "Ray", "MLflow"}
    assert all("\n" not in reason for reason in unreachable.values())
    assert "no answer from Ray's dashboard" in unreachable["Ray"]
    assert "secret" not in out


def test_on_a_cluster_nothing_of_this_machine_is_asked(
    home: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.named("mine", load_config("quickstart")).mlflow_run_id = "0" * 32
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    unreachable = json.loads(status("mine", "--json")[1])["unreachable"]
    assert "MARA_REDIS_URL is not set" in unreachable["Redis"]
    assert "MLFLOW_TRACKING_URI is not set" in unreachable["MLflow"]
    assert not (home / "mlflow.db").exists()
    assert not (home / "redis").exists()


def test_no_such_run(status: Status) -> None:
    code, out, err = status("absent")
    assert (code, out) == (1, "")
    assert err.startswith("error: run 'absent': no such run in ")


def test_wrong_usage(status: Status) -> None:
    assert status()[0] == 2
