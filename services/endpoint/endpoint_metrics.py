"""Prometheus metrics of the endpoint."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.endpoint.decode_loop import DecodeLoop

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_S = (0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class EndpointMetrics:
    """What one replica has done; every series carries its name as the label ``replica``."""

    def __init__(self, replica: str) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._registry.register(_ProcessOfReplica(replica))
        self._replica = replica
        self._requests = Counter(
            "mara_requests",
            "HTTP requests by route and status; 499: the client left",
            ("replica", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mara_request_seconds",
            "time from a request to the end of its answer",
            ("replica", "route"),
            buckets=_REQUEST_S,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "mara_time_to_first_token_seconds",
            "time from a request to the first token of its answer, queueing included",
            ("replica",),
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """Count a request and the time until the last byte of its answer."""
        self._requests.labels(self._replica, route, status).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time until a request had its first token."""
        self._first_token.labels(self._replica).observe(seconds)

    def watch(self, loop: DecodeLoop) -> None:
        """Report on a decode loop from now on."""
        self._registry.register(_LoopCollector(loop, self._replica))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _ProcessOfReplica(ProcessCollector):
    """Memory, CPU seconds and open files of this process, as those of a replica."""

    def __init__(self, replica: str) -> None:
        super().__init__(registry=None)
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self._replica})
                for sample in metric.samples
            ]
            yield metric


class _LoopCollector:
    """Reads a loop's counters when they are asked for."""

    def __init__(self, loop: DecodeLoop, replica: str) -> None:
        self._loop = loop
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        loop = self._loop
        gauges = {
            "mara_slots": ("slots of the decoder", loop.num_slots),
            "mara_slots_in_use": ("slots that answers run in", loop.in_use),
            "mara_waiting_answers": ("answers that wait for a slot", loop.waiting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["replica"])
            gauge.add_metric([self._replica], value)
            yield gauge
        counters = {
            "mara_tokens": ("tokens answered", loop.tokens),
            "mara_candidates_examined": (
                "candidates that finished answers needed; tokens / examined is the accept rate",
                loop.examined,
            ),
            "mara_candidates_looked": ("candidates put through the LLM for them", loop.looked),
        }
        for name, (text, by_kind) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["replica", "kind"])
            for kind in ("base", "aligned"):
                counter.add_metric([self._replica, kind], by_kind[kind])
            yield counter
        answers = CounterMetricFamily(
            "mara_answers", "answers by finish reason", labels=["replica", "reason"]
        )
        for reason in ("stop", "length", "cancelled", "failed"):
            answers.add_metric([self._replica, reason], loop.finished[reason])
        yield answers
