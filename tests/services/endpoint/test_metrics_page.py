"""GET /metrics puts the pages of all Ray nodes together."""

import asyncio
from collections.abc import Sequence
from unittest.mock import patch

import pytest
from local_cluster import free_ports
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from services.endpoint.metrics_page import metrics_page
from services.http.api_errors import ApiError

METRICS_OFF = -1  # the port that Ray gives then


def node(port: int, *, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port}


def page(nodes: Sequence[dict[str, object]]) -> list[str]:
    with patch("ray.nodes", lambda: nodes):
        return asyncio.run(metrics_page()).decode().splitlines()


@pytest.fixture
def two_nodes():
    """Each with one replica that has answered as many tokens as its number, and metrics of Ray."""
    servers = []
    for number in (1, 2):
        registry = CollectorRegistry()
        labels = {"replica": f"r{number}", "WorkerId": "1f", "kind": "base"}
        tokens = Counter("ray_mara_tokens_total", "tokens answered", labels, registry=registry)
        tokens.labels(**labels).inc(number)
        Gauge("ray_node_mem_used", "mara_", registry=registry).set(1)
        servers.append(start_http_server(0, "127.0.0.1", registry))
    yield [node(server.server_port) for server, _ in servers]
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_it_shows_the_replicas_of_all_nodes_and_nothing_of_ray(two_nodes):
    lines = [line for line in page(two_nodes) if "_created" not in line]
    assert lines == [
        "# HELP mara_tokens_total tokens answered",
        "# TYPE mara_tokens_total counter",
        'mara_tokens_total{kind="base",replica="r1"} 1.0',
        'mara_tokens_total{kind="base",replica="r2"} 2.0',
    ]


def test_a_node_that_does_not_answer_is_left_out_and_logged(two_nodes, caplog):
    [closed] = free_ports(1)
    found = page([two_nodes[0], node(closed), node(METRICS_OFF), node(closed, alive=False)])
    assert 'mara_tokens_total{kind="base",replica="r1"} 1.0' in found
    logged = [r.message for r in caplog.records if r.name == "services.endpoint.metrics_page"]
    assert len(logged) == 1
    assert f"no metrics from the Ray node at http://127.0.0.1:{closed}/metrics: " in logged[0]


def test_without_any_it_is_503():
    with pytest.raises(ApiError, match="no node of the Ray cluster gives") as caught:
        page([node(METRICS_OFF)])
    assert caught.value.status == 503
    assert caught.value.body.error.code == "metrics_unavailable"
