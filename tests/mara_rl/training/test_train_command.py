"""`mara-rl train` for real: Ray, Serve, Redis, MLflow, PPO, registry; only the models are tiny."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_checkpoints import BeaverFolder
from training_runs import COMMAND

from mara_rl.cli.app import main
from mara_rl.training.config import load_config
from mara_rl.training.run.run_folder import RunFolder, RunOutcome
from services.cluster.redis_server import connect, redis_url

pytestmark = pytest.mark.slow

RESULT_LINE = re.compile(r"^preference rate: [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] \(n=\d+\)$")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llms: dict[str, Path]) -> Path:
    """A config file whose LLM, score models and prompts are tiny."""
    folder = tmp_path_factory.mktemp("train")
    for name, kind in (("reward", "reward"), ("cost", "cost")):
        BeaverFolder(folder / name, score_type=kind).write()
    prompts = folder / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"Tell me about {i} foxes."} for i in range(40)]
    rows.append({"id": "long", "prompt": "Tell me about foxes. " * 1000})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    service = {"num_cpus": 0.1, "torch_threads": 1}
    settings = {
        "name": "tiny",
        "llm": {"name": str(tiny_llms["llama"]), "dtype": "float32"},
        "candidates": {"top_k": 8, "top_p": 0.9},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "scores": {
            "reward": {"model": str(folder / "reward"), "weight": 1.0, **service},
            "cost": {"model": str(folder / "cost"), "weight": -1.0, **service},
        },
        "rollouts": {
            "num_slots": 8,
            "fragment_steps": 16,
            "max_new_tokens": 6,
            "num_cpus": 1,
            "torch_threads": 1,
        },
        "warm_start": {
            "answers": 64,
            "rounds": 2,
            "epochs": 3,
            "batch_size": 64,
            "win_margin": 0.25,
            "distil_epochs": 1,
        },
        "ppo": {"iterations": 4, "kl_coeff": 0.05, "minibatch_size": 64},
        "checkpoint": {"every_iterations": 2},
        "evaluation": {"kl_prompts": 8},
        "driver_torch_threads": 1,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MARA_REDIS_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def mara_rl(*arguments: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit status and what is printed, for commands that end before anything is trained."""
    monkeypatch.setattr(sys, "argv", ["mara-rl", *arguments])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capsys.readouterr()


def test_a_run_trains_compares_registers_and_resumes(config: Path, home: Path) -> None:
    done = mara_rl("train", str(config))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if RESULT_LINE.match(line)]) == 1
    assert "registered models:/mara-llama@candidate (version 1)" in lines
    for split in ("train", "heldout"):
        assert any(
            line.startswith(f"prompts.{split}: 1 of 41 prompts do not fit") and "'long'" in line
            for line in lines
        )
    run = home / "tiny-1"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "mlflow_run_id",
        "checkpoints",
        "agent",
        "evaluation",
        "lock",
        "outcome.json",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"000002", "000004"}
    figures = json.loads((run / "evaluation" / "summary.json").read_text())
    assert figures["prompts"]["n"] == figures["result"]["n"] == 40
    assert {p.name for p in (run / "evaluation").iterdir()} == {
        "answers",
        "inputs.json",
        "lock",
        "report.html",
        "scores.jsonl",
        "summary.json",
    }
    answers = run / "evaluation" / "answers"
    for name, count in (("base", 40), ("agent", 40), ("kl/agent", 8)):
        assert len((answers / f"{name}.jsonl").read_text().splitlines()) == count
    state = json.loads((run / "checkpoints" / "000004" / "state.json").read_text())
    assert state["iteration"] == 4
    assert state["score_scales"]["reward"] > 0

    # Resumed at its end: nothing is trained again, the comparison comes out the same.
    again = mara_rl("train", "--resume", "tiny-1")
    assert again.returncode == 0, again.stderr
    assert "resumed tiny-1 at iteration 4" in again.stdout
    assert "registered before: models:/mara-llama/1" in again.stdout
    first, second = (
        next(line for line in out.splitlines() if RESULT_LINE.match(line))
        for out in (done.stdout, again.stdout)
    )
    assert first == second
    assert 0 < lifetime_of_queues_s() <= 7 * 24 * 3600


def lifetime_of_queues_s() -> int:
    """That of what is in the embedded Redis; -1 where it stays."""
    with redis_url(allow_embedded=True) as url, connect(url) as client:
        [seconds] = {client.ttl(key) for key in client.keys("mara:*")}
    return seconds


def test_a_run_by_name_is_left_alone_once_done_and_by_another_config(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_config("quickstart")
    folder = RunFolder.named("mine", settings)
    command = functools.partial(in_this_process, monkeypatch, capsys, "train")
    status, _, error = command("quickstart", "--set", "seed=1", "--run", "mine")
    assert status == 1
    assert "run 'mine' was started with another config (seed 0, not 1)" in error
    with folder.claimed():
        second = mara_rl("train", "--resume", "mine")
    assert second.returncode == 1
    assert "error: run 'mine' is being trained by another process" in second.stderr
    assert RunFolder.open("mine")[1] == settings
    folder.finish(RunOutcome(run="mine", agent_uri="models:/mara-x/1", preference_rate=None))
    status, output, _ = command("quickstart", "--run", "mine")
    assert status == 0
    assert "done before: models:/mara-x/1" in output


def test_signals_to_stop_save_and_the_run_resumes(config: Path, home: Path) -> None:
    checkpoints = home / "tiny-1" / "checkpoints"

    def newest() -> int:
        return max((int(path.name[:6]) for path in checkpoints.glob("[0-9]*")), default=0)

    arguments = [str(config), "--set", "ppo.iterations=500", "--set", "evaluation=null"]
    arguments += ["--set", "prompts.queue=of-the-user"]
    for send, signum, status in (
        (os.killpg, signal.SIGINT, 130),  # as a terminal does: to the whole process group
        (os.kill, signal.SIGTERM, 143),  # as what runs a service does
    ):
        before = newest()
        running = subprocess.Popen(
            [*COMMAND, "train", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while newest() == before or newest() < 2:
            assert running.poll() is None, "training ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        send(running.pid, signum)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == status
        assert "continue with `mara-rl train --resume tiny-1`" in output
        assert (f"resumed tiny-1 at iteration {before}" in output) is (before > 0)
        arguments = ["--resume", "tiny-1"]

    path = home / "tiny-1" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["ppo"]["iterations"] = newest() + 1
    path.write_text(yaml.safe_dump(settings))
    resumed = mara_rl("train", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed tiny-1 at iteration {settings['ppo']['iterations'] - 1}" in resumed.stdout
    assert (home / "tiny-1" / "agent" / "agent.safetensors").is_file()
    assert lifetime_of_queues_s() == -1  # the user may have pushed prompts that are nowhere else


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train"], 2, "give either a config to start or --resume RUN"),
        (["train", "nonsense"], 1, "error: config 'nonsense': neither a preset"),
        (["train", "quickstart", "--set", "ppo.x=1"], 1, "error: config 'quickstart': unknown key"),
        (["train", "--resume", "gone"], 1, "error: run 'gone': no such run"),
        (["train", "--resume", "gone", "--run", "it"], 2, "--run cannot change a run"),
        (["train", "quickstart", "--run", "../it"], 1, "error: run name '../it': expected letters"),
        (
            ["train", "quickstart", "--set", "prompts.train=missing.jsonl"],
            1,
            "error: missing.jsonl: no such file",
        ),
        (
            ["train", "quickstart", "--set", "rollouts.num_runners=999"],
            1,
            "error: plan asks for 999.2 CPU (reward 0.1 + cost 0.1 + runners 999 x 1)",
        ),
        (
            ["train", "quickstart", "--set", "llm.name=/no/such/llm"],
            1,
            "error: llm '/no/such/llm' could not be loaded",
        ),
        (
            ["train", "quickstart", "--set", "evaluation.judges.cost=no-such-judge"],
            1,
            "error: score model 'no-such-judge' is neither a shipped name",
        ),
    ],
)
def test_bad_input_is_named_on_one_line(
    session_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    found, _, error = in_this_process(monkeypatch, capsys, *arguments)
    assert found == status
    assert message in error
    assert "Traceback" not in error
    assert not list(session_home.glob("*/config.yaml")), "a run that never began leaves no folder"
