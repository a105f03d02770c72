import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mara_rl.cli.app import app
from mara_rl.common.errors import ConfigError, DataError
from services.cluster.redis_server import connect, redis_url
from services.prompt_queue.prompt_queue import PromptQueue


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    for name in ("MARA_REDIS_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"text {i}", "id": i}) + "\n" for i in range(3)))
    return str(path)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["prompts", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def figures(*args: str) -> dict[str, str]:
    return dict(line.split("\t") for line in run("status", *args).splitlines())


def test_push_before_training_stays_on_disk(prompt_file):
    assert run("push", prompt_file) == "queue default: 3 new prompts, 0 already there, 3 in all\n"
    assert run("push", prompt_file) == "queue default: 0 new prompts, 3 already there, 3 in all\n"
    shown = figures()
    assert (shown["prompts"], shown["epoch"], shown["waiting"]) == ("3", "none yet", "0")


def test_push_with_repeats_into_a_named_queue(prompt_file):
    run("push", prompt_file, "--queue", "mine", "--repeats", "2")
    for command in ("status", "requeue"):
        with pytest.raises(ConfigError, match=r"queue 'default': no such queue in unix://.*redis"):
            run(command)
    with redis_url(allow_embedded=True) as url:
        assert len(PromptQueue(connect(url), "mine").read("reader", 100)) == 6


def test_dead_letters_are_shown_and_put_back(prompt_file):
    run("push", prompt_file)
    with redis_url(allow_embedded=True) as url:
        queue = PromptQueue(connect(url), "default")
        bad, _ = queue.read("reader", 2)
        queue.reject(bad.entry_id, "longer than the context")
        shown = figures()
        assert shown["dead letters"] == "1"
        assert shown[f"dead: {bad.prompt_id}"] == "longer than the context"
        assert shown["pending"] == "1"
        assert shown["reader reader"].startswith("1 pending, silent for 0 s")
        assert run("requeue") == "queue default: 1 prompts put back\n"
        assert figures()["dead letters"] == "0"
        assert run("requeue") == "queue default: 0 prompts put back\n"


def test_a_terminal_gets_a_table(prompt_file, monkeypatch):
    run("push", prompt_file)
    with redis_url(allow_embedded=True) as url:
        queue = PromptQueue(connect(url), "default")
        queue.reject(queue.read("reader", 1)[0].entry_id, "holds [INST] tags")
        monkeypatch.setenv("FORCE_COLOR", "1")
        shown = run("status")
    assert "queue default" in shown
    assert "│" in shown
    assert "holds [INST] tags" in shown  # as it is, not read as markup


def test_errors_are_one_line_and_exit_1(tmp_path, monkeypatch, prompt_file):
    with pytest.raises(DataError, match="no such file"):
        run("push", str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="queue name 'a b'"):
        run("status", "--queue", "a b")
    monkeypatch.setenv("MARA_REDIS_URL", "redis://:secret@127.0.0.1:port/0")
    result = subprocess.run(
        [sys.executable, "-c", "from mara_rl.cli.app import main; main()", "prompts", "status"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: Redis URL 'redis://***@127.0.0.1:port/0'")
    assert result.stderr.count("\n") == 1


def test_inside_a_cluster_the_embedded_redis_needs_asking_for(monkeypatch, prompt_file):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="MARA_REDIS_URL is not set, but RAY_ADDRESS is"):
        run("push", prompt_file)
    run("push", prompt_file, "--single-node")
    assert figures("--single-node")["prompts"] == "3"
