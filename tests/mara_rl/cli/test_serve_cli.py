"""``mara-rl serve``: refusals at once, and the whole thing over Ray Serve."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import requests
import torch
from small_agents import random_agent
from tiny_checkpoints import BeaverFolder

from mara_rl.agents.agent_files import save_agent
from mara_rl.cli import app
from mara_rl.llm.policy_llm import load_policy_llm
from mara_rl.tracking.registry import AgentRegistry
from mara_rl.tracking.store import tracking_uri
from mara_rl.tracking.tracking_run import TrackingRun

ASK = [{"role": "user", "content": "How do I bake bread?"}]
KEY = "a-key-for-the-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(monkeypatch, capsys):
    """Runs ``mara-rl serve …``, which is to end by itself; exit status and error output."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mara-rl", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--host", "0.0.0.0"), 1, "host '0.0.0.0' is reached from other machines: set MARA_API"),
        (("--port", "0"), 2, "--port"),
        (("--slots", "0"), 1, "endpoint: slots: .* not 0"),
        (("--dtype", "int3"), 1, "endpoint: dtype"),
        (("--threads", "0"), 1, "endpoint: torch_threads: .* not 0"),
        (("--score", "reward"), 2, "expected NAME=MODEL"),
        (("--score", "a=x", "--score", "a=y"), 2, "a is 'x' already"),
        (("--keys-file", "/no/such"), 1, "keys_file '/no/such'"),
        (("--set", "limits.max_answers=x"), 1, r"endpoint: limits\.max_answers: .* not 'x'"),
        (("--set", "polls=1"), 1, "endpoint: unknown key 'polls'"),
        (("--set", "slots"), 1, "--set 'slots': expected key=value"),
    ],
)
def test_what_cannot_work_is_refused_at_once(serve, monkeypatch, arguments, status, message):
    monkeypatch.delenv("MARA_API_KEY", raising=False)
    found, err = serve(*arguments)
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert re.search(message, plain), err
    assert found == status
    assert "Traceback" not in err


def test_a_port_in_use_is_named(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve("--port", port) == (
            1,
            f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n",
        )


class ServeProcess:
    """``mara-rl serve`` as a user starts it."""

    def __init__(self, home: Path, *arguments: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = dict(os.environ, MARA_HOME=str(home), MARA_API_KEY=KEY)
        code = "from mara_rl.cli.app import main; main()"
        command = [sys.executable, "-c", code, "serve", "--port", self.port, *arguments]
        self.out = home / "out.txt"
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 180
        while "playground:" not in self.out.read_text():
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """The process and all it started."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            for process in [*family, self.process]:
                process.kill()
        self.process.wait()


def register(uri: str, folder: Path, llm: str) -> int:
    with TrackingRun.start(uri, "registry", "run", {}) as run:
        logged = run.log_agent(folder)
    return AgentRegistry(uri).register("mara-tiny", logged, {"llm": llm})


@pytest.mark.slow
def test_the_endpoint_over_ray_serve(tiny_llms, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "tiny-llm"
    shutil.copytree(tiny_llms["llama"], folder)
    llm = load_policy_llm(str(folder), device="cpu", dtype="float32")
    uri = tracking_uri(allow_local=True)
    for seed in (1, 2):
        torch.manual_seed(seed)
        agent = random_agent(llm, "relative", top_k=6, llm=str(folder))
        save_agent(agent, tmp_path / f"agent-{seed}")
    register(uri, tmp_path / "agent-1", str(folder))
    score = tmp_path / "score"
    BeaverFolder(score).write()
    server = ServeProcess(
        tmp_path,
        *("--llm", folder, "--slots", 2, "--threads", 1, "--set", "limits.max_answers=60"),
        *("--agent", f"local={tmp_path / 'agent-2'}", "--score", f"reward={score}"),
    )
    try:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        registered = "mara-tiny@candidate"
        assert [model.id for model in client.models.list()] == ["tiny-llm", "local", registered]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong-key-here").models.list()
        with pytest.raises(openai.BadRequestError, match=r"\bn\b.* 60"):
            client.chat.completions.create(model="local", messages=ASK, n=61)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="local", messages=ASK, temperature=9)

        def ask(model: str, **options: object):
            options = {"messages": ASK, "max_tokens": 12} | options
            return client.chat.completions.create(model=model, **options)

        whole = ask("local", extra_body={"mara": {"scores": True}}).choices[0]
        assert isinstance(whole.mara["scores"]["reward"], float)
        streamed = "".join(c.choices[0].delta.content or "" for c in ask("local", stream=True))
        assert streamed == whole.message.content
        assert requests.get(server.url, timeout=30).text.startswith("<!doctype html>")
        stays = ask(registered, stream=True, max_tokens=200)
        assert next(iter(stays)).system_fingerprint == "mara-tiny/1"

        register(uri, tmp_path / "agent-2", str(folder))  # moves the alias
        deadline = time.monotonic() + 15
        while ask(registered).system_fingerprint != "mara-tiny/2":
            assert time.monotonic() < deadline
        assert ask(registered).choices[0].message.content == whole.message.content
        assert {chunk.system_fingerprint for chunk in stays} == {"mara-tiny/1"}

        leaving = ask("local", stream=True, max_tokens=200)
        next(iter(leaving))
        leaving.close()
        until(lambda: left_and_freed(server, 1))
        leave_before_the_answer(
            server, {"model": "local", "messages": ASK, "max_tokens": 200, "n": 60}
        )
        until(lambda: left_and_freed(server, 2))

        running = ask("local", stream=True, max_tokens=200)
        next(iter(running))
        server.process.send_signal(signal.SIGTERM)
        *_, last = running  # is let finish
        assert last.choices[0].finish_reason
        assert server.process.wait(timeout=60) == 0
        assert "letting running answers finish" in server.out.read_text()
        log = (tmp_path / "logs" / f"endpoint-{server.port}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in log]
        assert any(record.get("completion_tokens") == 12 for record in records)
        left = [record["stream"] for record in records if record.get("status") == 499]
        assert sorted(left) == [False, True]
        assert not [record for record in records if record.get("status") == 500]
        assert "bake bread" not in "".join(log)
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.cluster
def test_replicas_that_cannot_load_end_it_in_one_line(tiny_llms, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llms["llama"], broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    server = ServeProcess(tmp_path, *("--llm", broken, "--slots", 2, "--replicas", 2))
    try:
        assert server.process.wait(timeout=120) == 1
        errors = [line for line in server.out.read_text().splitlines() if "error:" in line]
        assert len(errors) == 1
        assert re.match(
            r"error: the endpoint did not start: loading failed: llm .*broken", errors[0]
        )
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.cluster
def test_two_replicas_answer_as_one(tiny_llms, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "tiny-llm"
    shutil.copytree(tiny_llms["llama"], folder)
    llm = load_policy_llm(str(folder), device="cpu", dtype="float32")
    for name in ("local", "agent-1"):
        save_agent(random_agent(llm, "relative", top_k=6, llm=str(folder)), tmp_path / name)
    register(tracking_uri(allow_local=True), tmp_path / "agent-1", str(folder))
    server = ServeProcess(
        tmp_path,
        *("--llm", folder, "--slots", 2, "--threads", 1, "--replicas", 2),
        *("--agent", f"local={tmp_path / 'local'}"),
    )
    try:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

        def ask(number: int) -> tuple[str, str, int]:
            answer = client.chat.completions.create(
                model="local" if number % 2 else "mara-tiny@candidate",
                messages=ASK,
                max_tokens=24,
                temperature=1.0,
                seed=3,
            )
            text = answer.choices[0].message.content
            return answer.system_fingerprint, text, answer.usage.completion_tokens

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        assert {version for version, _, _ in answers} == {"local", "mara-tiny/1"}
        assert len(set(answers)) == 2, "replicas answer the same request differently"
        for path in ("/v1/models", "/v1/models/local", "/health"):
            headers = {"Authorization": f"Bearer {KEY}"}
            responses = [
                requests.get(server.url + path, headers=headers, timeout=30) for _ in range(16)
            ]
            assert {answer.status_code for answer in responses} == {200}
            assert len({answer.text for answer in responses}) == 1, path
        tokens: dict[str, float] = {}
        deadline = time.monotonic() + 60
        expected = sum(count for _, _, count in answers)
        while sum(tokens.values()) != expected:  # it takes seconds until all are on the page
            assert time.monotonic() < deadline, (tokens, expected)
            pattern = r'^mara_tokens_total\{.*kind="aligned",replica="(.+)"\} (.+)$'
            found = re.findall(pattern, metrics(server), re.MULTILINE)
            tokens = {replica: float(value) for replica, value in found}
        assert len(tokens) == 2, "one replica has done all the work"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
    finally:
        server.kill()


def leave_before_the_answer(server: ServeProcess, body: dict) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    until(lambda: value("mara_slots_in_use", metrics(server)) > 0)
    connection.close()


def metrics(server: ServeProcess) -> str:
    return requests.get(f"{server.url}/metrics", timeout=30).text


def left_and_freed(server: ServeProcess, answers: int) -> bool:
    """Whether so many answers or more were left, and no slot is taken any more."""
    text = metrics(server)
    left = value("mara_answers_total", text, 'reason="cancelled"')
    return left >= answers and value("mara_slots_in_use", text) == 0


def value(name: str, text: str, label: str = "") -> float:
    """Of a metric of a server with one replica; −1 before it has said so."""
    found = re.search(rf"^{name}\{{.*{label}.*\}} (.*)$", text, re.MULTILINE)
    return float(found[1]) if found else -1.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
