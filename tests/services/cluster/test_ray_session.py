import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from mara_rl.common.errors import ConfigError
from services.cluster.ray_session import await_room, check_resources, missing_resources, ray_session

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def test_a_plan_that_fits_misses_nothing():
    requests = [("reward", {"CPU": 0.1}), ("cost", {"CPU": 0.1})] + 9 * [("runners", {"CPU": 0.2})]
    assert missing_resources(requests, [{"CPU": 2.0, "memory": 1e9}]) is None
    assert missing_resources([], []) is None


def test_too_little_in_total_names_every_summand():
    requests = [("reward", {"CPU": 0.1}), ("cost", {"CPU": 0.1})] + 3 * [("runners", {"CPU": 1})]
    assert missing_resources(requests, [{"CPU": 1.0}, {"CPU": 1.0}]) == (
        "plan asks for 3.2 CPU (reward 0.1 + cost 0.1 + runners 3 x 1) but the cluster has 2"
    )


def test_a_resource_that_no_node_has():
    missing = missing_resources([("runner", {"CPU": 1, "GPU": 1})], [{"CPU": 8.0}])
    assert missing == "plan asks for 1 GPU (runner 1) but the cluster has 0"


def test_enough_in_total_but_not_on_one_node():
    missing = missing_resources([("learner", {"CPU": 3})], [{"CPU": 2.0}, {"CPU": 2.0}])
    assert missing is not None
    assert "3 CPU on one node for learner" in missing
    assert "2 CPU; 2 CPU" in missing


def test_large_bundles_are_placed_before_small_ones():
    requests = [("small", {"CPU": 1}), ("small", {"CPU": 1}), ("large", {"CPU": 2})]
    assert missing_resources(requests, [{"CPU": 2.0}, {"CPU": 2.0}]) is None


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1:1", "no-port", "a:b"])
def test_an_address_without_a_cluster_is_refused_at_once(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS '{address}'"), ray_session():
        pass
    assert time.monotonic() - began < 30


VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.50.0
    Python: 3.11.9
This process on 192.0.2.1 was started with:
    Ray: 2.60.0
    Python: 3.12.3
"""
REFUSED = """Failed to connect to GCS. Last connection error: Traceback (most recent call last):
  File "ray/_private/node.py", line 996, in _init_gcs_client
    client = GcsClient(
ray.exceptions.AuthenticationError: InvalidAuthToken: the token is not the cluster's.
"""


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            RuntimeError(VERSIONS),
            "Version mismatch: The cluster was started with: Ray: 2.50.0 Python: 3.11.9 "
            "This process on 192.0.2.1 was started with: Ray: 2.60.0 Python: 3.12.3",
        ),
        (
            RuntimeError(REFUSED),
            "ray.exceptions.AuthenticationError: InvalidAuthToken: the token is not the cluster's.",
        ),
        (Exception("The current node timed out\nduring startup."), "The current node timed out"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_ray_says_when_it_cannot_begin_is_one_line(monkeypatch, raised, reason):
    def init(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379") from raised

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError) as joining, ray_session():
            pass
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError) as starting, ray_session():
        pass
    for caught, beginning in ((joining, "RAY_ADDRESS '127.0.0.1:"), (starting, "Ray did not st")):
        assert str(caught.value).startswith(beginning)
        assert f": {reason}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_is_no_ray_ends_in_one_line_within_two_minutes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from mara_rl.cli.app import main; main()",
                "train",
                "quickstart",
            ],
            env=os.environ | {"RAY_ADDRESS": address},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: RAY_ADDRESS '{address}': could not join a Ray cluster there: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_local_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-users-own-token-of-some-other-cluster")
    monkeypatch.setenv("HOME", str(tmp_path))

    @ray.remote(num_cpus=0)
    def child_environment() -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in AUTH}

    @ray.remote(num_cpus=1)
    class Occupant:
        def ready(self) -> bool:
            return True

    with ray_session(num_cpus=2) as session:
        assert session.owns_cluster
        in_child = ray.get(child_environment.remote())
        assert in_child["RAY_AUTH_MODE"] == "token"
        assert len(in_child["RAY_AUTH_TOKEN"]) == 64

        check_resources([("runners", {"CPU": 1})] * 2)
        with pytest.raises(ConfigError, match=r"3 CPU \(runners 3 x 1\).*has 2"):
            check_resources([("runners", {"CPU": 1})] * 3)

        await_room([("runners", {"CPU": 1})] * 2, timeout_s=30)
        occupant = Occupant.remote()
        ray.get(occupant.ready.remote())
        with pytest.raises(ConfigError) as caught:
            await_room([("runners", {"CPU": 1})] * 2 + [("driver", {})], timeout_s=2)
        assert str(caught.value) == (
            "no room for the plan within 2 s: waiting for runners 2 x (1 CPU); free in the "
            "cluster: 1 CPU"
        )
        await_room([("runners", {"CPU": 1})], timeout_s=30)  # what did not fit was given back
        ray.kill(occupant)
        await_room([("runners", {"CPU": 1})] * 2, timeout_s=30)

        listening = [
            connection.laddr
            for process in psutil.Process().children(recursive=True)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert 6379 not in {address.port for address in listening}

        with ray_session() as inner:
            assert inner.address == session.address
            assert not inner.owns_cluster
        assert ray.is_initialized()

        joined = _join_from_another_process(session.address)
        assert joined == "False 2.0"

    assert not ray.is_initialized()
    assert os.environ["RAY_AUTH_TOKEN"] == "the-users-own-token-of-some-other-cluster"
    assert "RAY_AUTH_MODE" not in os.environ
    assert not (tmp_path / ".ray").exists()


def _join_from_another_process(address: str) -> str:
    script = (
        "import ray; from services.cluster.ray_session import ray_session\n"
        "with ray_session(num_cpus=64) as session:\n"
        "    print(session.owns_cluster, ray.cluster_resources()['CPU'])"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"RAY_ADDRESS": address},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.strip()
