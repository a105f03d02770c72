"""Replicas of the endpoint on a real Ray Serve: what clients meet while some of them load."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import ray
import requests
from local_cluster import free_ports
from ray import serve
from tiny_checkpoints import deepened

from mara_rl.common.environment import environment_variables
from services.cluster.ray_session import ray_session
from services.endpoint.application import application
from services.endpoint.endpoint_config import EndpointConfig

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


class Watch(threading.Thread):
    """Asks for the models all the time, and keeps the statuses in order."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.statuses: list[int] = []
        self.retry_after: set[str | None] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                answer = requests.get(f"{self.url}/v1/models", timeout=60)
            except requests.ConnectionError:
                continue  # Serve is not there yet
            self.statuses.append(answer.status_code)
            if answer.status_code == 503:
                self.retry_after.add(answer.headers.get("retry-after"))

    def end(self) -> None:
        self._ended.set()
        self.join(60)


@pytest.fixture(scope="module")
def watch(tiny_llms, tmp_path_factory) -> Iterator[Watch]:
    """Has asked while two replicas came, then three others in their place; these still run."""
    variables = {
        "MARA_HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_BYTES": str(200 << 20),
        "RAY_metrics_report_interval_ms": "1000",
    }
    with environment_variables(variables), ray_session():
        [port] = free_ports(1)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        watch = Watch(f"http://127.0.0.1:{port}")
        watch.start()
        folder = tmp_path_factory.mktemp("llm") / "deep"
        llm = str(deepened(tiny_llms["llama"], folder, layers=120))  # seconds, for a 503 to be seen
        deploy(llm, 2)
        deadline = time.monotonic() + 60
        while watch.statuses[-1:] != [200]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        deploy(llm, 3)  # other settings: each replica is replaced, and one more comes
        asked = len(watch.statuses)
        while len(watch.statuses) < asked + 60:  # so that each of them has answered some
            assert time.monotonic() < deadline + 60
            time.sleep(0.1)
        watch.end()
        yield watch


def deploy(llm: str, replicas: int) -> None:
    """Returns once so many of them have loaded."""
    config = EndpointConfig(
        llm=llm, anonymous=True, num_replicas=replicas, num_cpus=0.1, slots=2, drain_timeout_s=5
    )
    serve.run(application(config), name="aligned", route_prefix="/")


def test_503_until_one_has_loaded_and_never_again(watch: Watch) -> None:
    first = watch.statuses.index(200)
    before, after = watch.statuses[:first], watch.statuses[first:]
    assert set(before) - {404} == {503}, Counter(before)  # 404: before there is an application
    assert watch.retry_after == {"1"}
    assert set(after) == {200}, Counter(after)
    assert len(after) > 20


def by_replica(url: str, series: str) -> dict[str, float]:
    """A metric on one page of metrics; ``series`` matches its name and its labels."""
    text = requests.get(url, timeout=30).text
    found = re.findall(rf"^{series}.* (\S+)$", text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


@pytest.mark.parametrize("page", ["endpoint", "Ray node"])
def test_one_scrape_shows_all_replicas_with_their_own_counts(watch: Watch, page: str) -> None:
    [node] = ray.nodes()
    url, prefix = f"{watch.url}/metrics", "mara"
    if page == "Ray node":
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        prefix = "ray_mara"
    replica = r'.*replica="(\w+)"'
    answered = rf'{prefix}_requests_total{{{replica},route="/v1/models",status="200"'
    deadline = time.monotonic() + 60
    while True:
        counts = by_replica(url, answered)
        slots = by_replica(url, rf"{prefix}_slots{{{replica}")
        # Of replicas that are gone the counts stay and the gauges go.
        if len(slots) == 3 and sum(counts.values()) == watch.statuses.count(200):
            break
        assert time.monotonic() < deadline, (counts, slots, Counter(watch.statuses))
        time.sleep(0.2)
    assert set(slots.values()) == {2}
    assert counts.keys() > slots.keys()
    assert all(counts.values())
