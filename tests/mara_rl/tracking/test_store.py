import os
import socket
import subprocess
import sys
import time

import pytest

from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.tracking.store import (
    experiment_id,
    http_limits,
    mlflow_client,
    tracking_uri,
)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_server_that_answers_is_taken(mlflow_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    assert tracking_uri(allow_local=False) == mlflow_server.uri


def test_without_a_server_nothing_is_local_unless_allowed():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set: expected http"):
        tracking_uri(allow_local=False)


def test_a_server_that_is_away_is_an_error_within_seconds(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    begin = time.monotonic()
    with pytest.raises(RetryableError) as caught:
        tracking_uri(allow_local=True)
    assert time.monotonic() - begin < 10
    message = str(caught.value)
    assert message.startswith(f"MLFLOW_TRACKING_URI http://***@127.0.0.1:{port}: no answer")
    assert "refused" in message
    assert "secret" not in message
    assert "\n" not in message


def test_a_server_that_never_answers_is_an_error_within_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(RetryableError, match="no answer"):
            tracking_uri(allow_local=True)
    assert time.monotonic() - begin < 9


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "ftp://host", "postgresql://h/db"])
def test_what_is_no_registry_is_refused(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as caught:
        tracking_uri(allow_local=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_may_create_the_local_store_at_once(tmp_path):
    code = (
        "from mara_rl.tracking.store import *; uri = tracking_uri(allow_local=True);"
        "print(uri, experiment_id(mlflow_client(uri), 'same'))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0] == answers[1] == (f"sqlite:///{tmp_path}/home/mlflow.db 1\n", "")


def test_artifacts_of_the_local_store_lie_beside_the_database(sqlite_uri, tmp_path):
    client = mlflow_client(sqlite_uri)
    found = experiment_id(client, "my/Experiment")
    assert experiment_id(client, "my/Experiment") == found
    location = client.get_experiment(found).artifact_location
    assert location == f"file://{tmp_path}/mlflow-artifacts/my-experiment"


def test_a_deleted_experiment_is_named(sqlite_uri):
    client = mlflow_client(sqlite_uri)
    client.delete_experiment(experiment_id(client, "gone"))
    with pytest.raises(ConfigError, match="'gone' is deleted"):
        experiment_id(client, "gone")


def test_limits_end_with_their_block(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with http_limits(timeout_s=3, retries=1):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
