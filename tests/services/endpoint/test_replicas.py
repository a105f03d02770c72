"""Replicas of the endpoint on a real Ray Serve: what clients meet while some of them load."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import requests
from local_cluster import free_ports
from ray import serve

from services.cluster.ray_session import ray_session
from services.endpoint.application import application
from services.endpoint.endpoint_config import EndpointConfig

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


class Watch(threading.Thread):
    """Asks all the time, and keeps the statuses in order."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.statuses: list[int] = []
        self.retry_after: set[str | None] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                answer = requests.get(self.url, timeout=60)
            except requests.ConnectionError:
                continue  # Serve is not there yet
            self.statuses.append(answer.status_code)
            if answer.status_code == 503:
                self.retry_after.add(answer.headers.get("retry-after"))

    def end(self) -> None:
        self._ended.set()
        self.join(60)


@pytest.fixture
def watch(tmp_path, monkeypatch) -> Iterator[Watch]:
    monkeypatch.setenv("MARA_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MEMORY_BYTES", str(200 << 20))
    with ray_session():
        [port] = free_ports(1)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        watch = Watch(f"http://127.0.0.1:{port}/v1/models")
        yield watch
        watch.end()


def deploy(llm: str, replicas: int) -> None:
    """Returns once so many of them have loaded."""
    config = EndpointConfig(
        llm=llm, anonymous=True, num_replicas=replicas, num_cpus=0.1, slots=2, drain_timeout_s=5
    )
    serve.run(application(config), name="aligned", route_prefix="/")


def test_503_until_one_has_loaded_and_never_again(watch: Watch, tiny_llms) -> None:
    llm = str(tiny_llms["llama"])
    watch.start()
    deploy(llm, 2)
    deadline = time.monotonic() + 60
    while watch.statuses[-1:] != [200]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    deploy(llm, 3)  # other settings: each replica is replaced, and one more comes
    time.sleep(1)
    watch.end()
    first = watch.statuses.index(200)
    before, after = watch.statuses[:first], watch.statuses[first:]
    assert set(before) - {404} == {503}, Counter(before)  # 404: before there is an application
    assert watch.retry_after == {"1"}
    assert set(after) == {200}, Counter(after)
    assert len(after) > 20
