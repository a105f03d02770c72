"""A node of a cluster is lost, with all that runs on it, and another one joins."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
from local_cluster import cluster_environment, ray_head, ray_node
from mlflow_servers import MLflowServer
from training_runs import LEARNER, REPLICA, RUNNER, metric_history

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

Node = Popen[bytes]
ROOM = "room"  # the custom resource that keeps parts on worker nodes


class Nodes:
    """A Ray cluster that the runs of ``chaos`` join."""

    def __init__(self, chaos, mlflow: MLflowServer, folder: Path, stack: ExitStack) -> None:
        self._chaos, self._folder, self._stack = chaos, folder, stack
        self._environment = cluster_environment(chaos.home, chaos.redis.url, mlflow.uri)
        self._joined = 0
        self.head = self.start_head()

    def start_head(self) -> Node:
        """Begin a new cluster."""
        head = self._stack.enter_context(ray_head(self._environment, self._folder, num_cpus=1))
        self._gcs = head.gcs
        self._chaos.env |= {**self._environment, "RAY_ADDRESS": head.gcs}
        return head.process

    def join(self) -> Node:
        """Start a worker node."""
        self._joined += 1
        ip = f"127.0.0.{self._joined + 1}"
        log = self._folder / f"{ip}.log"
        node = ray_node(self._environment, log, self._gcs, ip, num_cpus=2, resource=ROOM)
        return self._stack.enter_context(node)


@pytest.fixture
def nodes(chaos, mlflow_server: MLflowServer, tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(chaos, mlflow_server, tmp_path, stack)


def kill(node: Node) -> None:
    """All its processes at once, as when the power fails."""
    family = psutil.Process(node.pid).children(recursive=True)
    os.kill(node.pid, signal.SIGKILL)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def hosted(node: Node, title: str) -> int:
    """How many processes of a node have ``title`` in theirs."""
    found = 0
    for process in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += title in " ".join(process.cmdline())
    return found


def test_the_node_of_one_of_two_rollout_actors_dies(chaos, nodes) -> None:
    _, lost = nodes.join(), nodes.join()
    run = chaos.start(rollouts={"num_runners": 2, "resources": {ROOM: 1}})
    run.until_iteration(3)
    assert hosted(lost, RUNNER) == 1
    at = time.time()
    kill(lost)
    took_s = chaos.recovered(run, at)
    new = nodes.join()
    run.until(lambda: hosted(new, RUNNER), "the rollout actor on the new node")
    restarts = "faults/runner_restarts"
    run.until(lambda: any(n for _, n, _ in metric_history(chaos.home, restarts)), restarts)
    output = chaos.end(run, "the node of one of 2 rollout actors killed", took_s)
    assert "is replaced: " in output


@pytest.mark.parametrize("learners", [0, 1])
def test_the_node_of_all_parts_but_the_driver_dies(chaos, nodes, learners: int) -> None:
    part = {"resources": {ROOM: 0.2}}
    lost = nodes.join()
    run = chaos.start(
        rollouts={"num_runners": 1, **part},
        learner={"num_learners": learners, **part},
        scores={
            name: {"model": str(path), "weight": weight, "num_cpus": 0.1, **part}
            for (name, path), weight in zip(chaos.models.scores.items(), (1.0, -1.0), strict=True)
        },
    )
    run.until_iteration(3)
    assert hosted(lost, RUNNER) == 1
    assert hosted(lost, REPLICA.format("")) == 2
    assert hosted(lost, LEARNER) == learners
    at = time.time()
    kill(lost)
    time.sleep(5)
    nodes.join()
    took_s = chaos.recovered(run, at)
    parts = "rollout actor, both score replicas" + ", learner" * learners
    output = chaos.end(run, f"the node of {parts} killed, another after 5 s", took_s)
    assert output.count("going back to checkpoint") == learners


def test_a_run_whose_room_is_gone_for_good_ends(chaos, nodes) -> None:
    """It does not wait for ever, and goes on when submitted again to where there is room."""
    part = {"resources": {ROOM: 0.2}}
    lost = nodes.join()
    run = chaos.start(
        rollouts={"num_runners": 1, "placement_timeout_s": 40},
        learner={"num_learners": 1, **part},
    )
    run.until_iteration(3)
    at = time.time()
    kill(lost)
    output = run.finish(status=1)
    assert "going back to checkpoint" in output
    assert output.splitlines()[-1].startswith("error: no room for the plan within 40 s: ")
    nodes.join()
    run = chaos.resume()
    took_s = chaos.recovered(run, at)
    chaos.end(run, "the learner's node killed, no other; submitted again with one", took_s)


def test_the_head_dies_and_the_run_is_submitted_to_a_new_cluster(chaos, nodes) -> None:
    """The driver is left without a cluster: it has to end, so that whoever watches it may act."""
    nodes.join()
    run = chaos.start(rollouts={"num_runners": 1, "resources": {ROOM: 1}})
    run.until_iteration(5)
    at = time.time()
    kill(nodes.head)
    assert "Failed to connect to GCS within 60 seconds" in run.finish(status=1)
    nodes.start_head()
    nodes.join()
    run = chaos.resume()
    took_s = chaos.recovered(run, at)
    chaos.end(run, "the head node killed, the run submitted again to a new cluster", took_s)
