"""``ray.serve.metrics`` and a node's metrics port as one replica meets them, without Ray."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from unittest.mock import patch

import prometheus_client
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.metrics import MetricWrapperBase

# What Ray adds in a replica, and what its agent adds to all.
ADDED = {"application": "aligned", "deployment": "AlignedLLM", "replica": "test", "WorkerId": "1f"}


class RayMetrics:
    """In place of the module: metrics made with it are on the page of ``registry``."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()

    def Counter(self, name: str, text: str, tag_keys: tuple[str, ...] = ()) -> "_Recorded":
        return self._made(prometheus_client.Counter, name, text, tag_keys)

    def Gauge(self, name: str, text: str, tag_keys: tuple[str, ...] = ()) -> "_Recorded":
        return self._made(prometheus_client.Gauge, name, text, tag_keys)

    def Histogram(
        self, name: str, text: str, boundaries: Sequence[float], tag_keys: tuple[str, ...] = ()
    ) -> "_Recorded":
        return self._made(prometheus_client.Histogram, name, text, tag_keys, buckets=boundaries)

    def _made(
        self,
        kind: type[MetricWrapperBase],
        name: str,
        text: str,
        tag_keys: tuple[str, ...],
        **options: Sequence[float],
    ) -> "_Recorded":
        labels = (*ADDED, *tag_keys)
        return _Recorded(kind(f"ray_{name}", text, labels, registry=self.registry, **options))


class _Recorded:
    def __init__(self, metric: MetricWrapperBase) -> None:
        self._metric = metric

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self._of(tags).inc(value)

    def set(self, value: float) -> None:
        self._of({}).set(value)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self._of(tags or {}).observe(value)

    def _of(self, tags: Mapping[str, str]) -> MetricWrapperBase:
        assert all(isinstance(value, str) for value in tags.values()), "Ray refuses it"
        return self._metric.labels(**ADDED, **tags)


@contextlib.contextmanager
def one_ray_node() -> Iterator[RayMetrics]:
    """What is made meanwhile by `EndpointMetrics` is on a page that ``ray.nodes()`` leads to."""
    found = RayMetrics()
    server, thread = start_http_server(0, "127.0.0.1", found.registry)
    node = {
        "Alive": True,
        "NodeManagerAddress": "127.0.0.1",
        "MetricsExportPort": server.server_port,
    }
    try:
        with (
            patch("services.endpoint.endpoint_metrics.metrics", found),
            patch("ray.nodes", lambda: [node]),
        ):
            yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
