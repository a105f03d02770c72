"""The recipes of `deploy/` on a cluster of this machine: submit, look up, submit again, serve."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import yaml
from local_cluster import ROOT, LocalCluster, free_ports, local_cluster, system_redis

from mara_rl.training.run.run_folder import RunOutcome

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

RUN = "smoke-1"
SUBMIT = str(ROOT / "deploy" / "submit.sh")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    if system_redis() is None:
        reason = "no redis-server: apt-get install redis-server"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with local_cluster(folder, num_cpus=4, home=folder / "home") as running:
        yield running


@pytest.fixture(scope="module")
def trained(cluster: LocalCluster) -> str:
    """What the job of the first submission has printed."""
    done = cluster.run(SUBMIT, RUN, "deploy/smoke.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_submitted_run_ends_with_a_registered_agent(cluster: LocalCluster, trained: str) -> None:
    assert "registered models:/mara-smoke@candidate (version 1)" in trained
    assert re.search(r"^preference rate: .*\(n=8\)$", trained, re.MULTILINE)
    outcome = RunOutcome.model_validate_json((home(cluster) / RUN / "outcome.json").read_text())
    assert outcome.agent_uri == "models:/mara-smoke/1"


def test_no_secret_reaches_the_job_s_log_or_description(
    cluster: LocalCluster, trained: str
) -> None:
    described = cluster.run("ray", "job", "list")
    assert RUN in described.stdout
    password = cluster.redis.split("@")[0].rpartition(":")[2]
    for secret in (password, cluster.environment["RAY_AUTH_TOKEN"]):
        assert secret not in described.stdout + described.stderr + trained


def test_the_agent_loads_and_runs_with_mlflow_and_torch_alone(
    cluster: LocalCluster, trained: str
) -> None:
    script = """
import sys

class OnlyMlflowAndTorch:
    def find_spec(self, name, path=None, target=None):
        barred = ("mara_rl", "envs", "services", "ray", "transformers", "redis", "gymnasium")
        barred += ("safetensors",)
        if name.partition(".")[0] in barred:
            raise ModuleNotFoundError(f"barred: {name}")

sys.meta_path.insert(0, OnlyMlflowAndTorch())
import mlflow, numpy as np
agent = mlflow.pyfunc.load_model("models:/mara-smoke@candidate")
width = agent.metadata.signature.inputs.inputs[0].shape[1]
state = np.zeros((3, width), np.float32)
accept = agent.predict({"h": state, "base_logit": np.zeros(3, np.float32), "h_prefix": state})
print(accept.shape, bool(((accept > 0) & (accept < 1)).all()))
"""
    done = cluster.run(sys.executable, "-c", script)
    assert done.stdout.splitlines()[-1:] == ["(3,) True"], done.stderr


def test_mlflow_answers_by_the_name_of_its_service_and_by_no_other(cluster: LocalCluster) -> None:
    url = f"{cluster.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    status = {
        host: requests.get(url, headers={"Host": host}, timeout=30).status_code
        for host in ("mlflow:5000", "elsewhere.example.com")
    }
    assert status == {"mlflow:5000": 200, "elsewhere.example.com": 403}


def test_status_tells_of_job_queue_checkpoint_and_metrics(
    cluster: LocalCluster, trained: str
) -> None:
    done = cluster.run("mara-rl", "status", RUN, "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["state"] == "done"
    assert status["checkpoint"]["iteration"] == 1
    assert status["queue"]["prompts"] > 100
    assert status["queue"]["dead"] == 0
    assert [job["status"] for job in status["ray"]["jobs"]] == ["SUCCEEDED"]
    assert status["ray"]["services"] == {}, "the run's own score services went with it"
    assert status["tracking"]["status"] == "FINISHED"
    assert status["tracking"]["iteration"] == 1
    assert status["tracking"]["metrics"]["rollout/answers"] > 0
    assert status["unreachable"] == {}

    wrong = cluster.run("env", f"RAY_AUTH_TOKEN={'0' * 64}", "mara-rl", "status", RUN, "--json")
    assert wrong.returncode == 0, wrong.stderr
    status = json.loads(wrong.stdout)
    assert status["ray"] is None
    assert "no answer from Ray's dashboard: " in status["unreachable"]["Ray"]


@pytest.mark.parametrize(
    ("token", "version", "reason"),
    [("0" * 64, None, "AuthenticationError: "), (None, "2.0.0", "Version mismatch: .* Ray: 2.0.0")],
)
def test_a_cluster_that_does_not_let_it_in_ends_a_run_in_one_line(
    cluster: LocalCluster, token: str | None, version: str | None, reason: str
) -> None:
    script = f"import ray; ray.__version__ = {version!r} or ray.__version__\n"
    script += "from mara_rl.cli.app import main; main()"
    secret = token or cluster.environment["RAY_AUTH_TOKEN"]
    command = ["env", f"RAY_ADDRESS={cluster.gcs}", f"RAY_AUTH_TOKEN={secret}", sys.executable]
    done = cluster.run(*command, "-c", script, "train", "deploy/smoke.yaml", "--run", "not-begun")
    assert done.returncode == 1
    expected = f"error: RAY_ADDRESS '{cluster.gcs}': could not join a Ray cluster there: .*{reason}"
    assert re.match(expected, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_done_ends_at_once_when_submitted_again(
    cluster: LocalCluster, trained: str
) -> None:
    began = time.monotonic()
    again = cluster.run(SUBMIT, RUN, "deploy/smoke.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done before: models:/mara-smoke/1" in again.stdout
    assert time.monotonic() - began < 60


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    cluster: LocalCluster, trained: str
) -> None:
    (home(cluster) / RUN / "outcome.json").unlink()  # as if it had died before its end
    again = cluster.run(SUBMIT, RUN, "deploy/smoke.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumed {RUN} at iteration 1" in again.stdout
    assert "registered before: models:/mara-smoke/1" in again.stdout


def test_a_job_that_is_stopped_or_killed_goes_on_when_submitted_again(
    cluster: LocalCluster, trained: str
) -> None:
    def submit(number: int) -> None:
        command = ["ray", "job", "submit", "--no-wait", "--submission-id", f"cut-{number}"]
        command += ["--metadata-json", '{"run": "cut"}']
        command += ["--runtime-env", "deploy/runtime_env.yaml", "--working-dir", "."]
        command += ["--", "mara-rl", "train", "deploy/smoke.yaml", "--run", "cut"]
        command += ["--set", "ppo.iterations=500", "--set", "checkpoint.every_iterations=500"]
        submitted = cluster.run(*command)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def log(number: int) -> str:
        return cluster.run("ray", "job", "logs", f"cut-{number}").stdout

    def until(happened: Callable[[], object], number: int) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < deadline, log(number)

    submit(1)
    until(lambda: (status_of(cluster, "cut")["tracking"] or {}).get("iteration"), 1)
    assert cluster.run("ray", "job", "stop", "cut-1").returncode == 0
    assert "interrupted: continue with `mara-rl train --resume cut`" in log(1)
    status = status_of(cluster, "cut")
    assert status["state"] == "stopped"
    saved = status["checkpoint"]["iteration"]
    assert saved >= 1, "which is not one of every 500"
    assert status["ray"]["services"] == {}

    submit(2)
    until(lambda: f"resumed cut at iteration {saved}" in log(2), 2)
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-8:-4] == ["train", "deploy/smoke.yaml", "--run", "cut"]:
            process.kill()
    until(lambda: status_of(cluster, "cut")["ray"]["jobs"][0]["status"] == "FAILED", 2)

    submit(3)
    until(lambda: f"resumed cut at iteration {saved}" in log(3), 3)
    assert cluster.run("ray", "job", "stop", "cut-3").returncode == 0
    status = status_of(cluster, "cut")
    assert [job["status"] for job in status["ray"]["jobs"]] == ["STOPPED", "FAILED", "STOPPED"]
    assert status["checkpoint"]["iteration"] >= saved
    assert status["ray"]["services"] == {}, "those of the killed driver went too"


def test_the_agent_is_served(cluster: LocalCluster, trained: str, tmp_path: Path) -> None:
    [port] = free_ports(1)
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    application = next(app for app in config["applications"] if app["name"] == "aligned")
    application["args"] |= {"num_replicas": 1, "max_replicas": None}  # four LLMs need more memory
    scores = yaml.safe_load((ROOT / "deploy" / "scores.yaml").read_text())["applications"]
    [keyed] = [app for app in scores if app["name"] == "reward"]
    config["applications"].append(keyed | {"name": "keyed-reward"})
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    down = cluster.run("serve", "shutdown", "-y", "-a", cluster.dashboard)
    assert down.returncode == 0, down.stdout + down.stderr
    deployed = cluster.run("serve", "deploy", str(path), "-a", cluster.dashboard)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key=cluster.environment["MARA_API_KEY"],
        max_retries=0,
    )
    answer = None
    deadline = time.monotonic() + 180
    while answer is None:
        try:
            answer = client.chat.completions.create(
                model="mara-smoke@candidate",
                messages=[{"role": "user", "content": "Name three rivers."}],
                max_tokens=8,
                extra_body={"mara": {"scores": True}},
            )
        except (openai.APIConnectionError, openai.NotFoundError, openai.InternalServerError):
            assert time.monotonic() < deadline, cluster.run("serve", "status").stdout
            time.sleep(1)
    assert answer.system_fingerprint.startswith("mara-smoke/")
    assert set(answer.choices[0].mara["scores"]) == {"reward", "cost"}

    # Its score services may serve runs as well, by name or by URL, and stay when these end.
    url = f"http://127.0.0.1:{port}/reward"
    shared = ("--set", f"scores.reward.url={url}", "--set", "scores.cost.app=cost")
    quick = ("--set", "evaluation=null")
    run = cluster.run(SUBMIT, "smoke-2", "deploy/smoke.yaml", *shared, *quick)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "registered models:/mara-smoke@candidate" in run.stdout
    assert cluster.environment["MARA_SCORE_KEY"] not in run.stdout + run.stderr
    status = json.loads(cluster.run("mara-rl", "status", "smoke-2", "--json").stdout)
    services = {app: found["status"] for app, found in status["ray"]["services"].items()}
    assert services == {"cost": "RUNNING"}
    assert requests.get(f"{url}/v1/model", timeout=30).status_code == 401


def status_of(cluster: LocalCluster, run: str) -> dict[str, Any]:
    done = cluster.run("mara-rl", "status", run, "--json")
    return json.loads(done.stdout) if done.returncode == 0 else {"tracking": None}


def home(cluster: LocalCluster) -> Path:
    return Path(cluster.environment["MARA_HOME"])
