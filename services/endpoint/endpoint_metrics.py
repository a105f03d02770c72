"""What one replica tells Ray's metrics, which add replica, deployment and application to it."""

import threading
from collections import Counter
from collections.abc import Mapping

import psutil
from ray.serve import metrics

from services.endpoint.decode_loop import DecodeLoop

_FIRST_TOKEN_S = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_REQUEST_S = [0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_REPORT_S = 1.0


class EndpointMetrics:
    """Requests are counted as they end; the decode loop is read once a second, never by token."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "mara_requests_total",
            "HTTP requests by route and status; 499: the client left",
            ("route", "status"),  # type: ignore[arg-type]  # Ray's annotation is of one
        )
        self._seconds = metrics.Histogram(
            "mara_request_seconds",
            "time from a request to the end of its answer",
            _REQUEST_S,
            ("route",),
        )
        self._first_token = metrics.Histogram(
            "mara_time_to_first_token_seconds",
            "time from a request to the first token of its answer, queueing included",
            _FIRST_TOKEN_S,
        )
        self._slots = metrics.Gauge("mara_slots", "slots of the decoder")
        self._in_use = metrics.Gauge("mara_slots_in_use", "slots that answers run in")
        self._waiting = metrics.Gauge("mara_waiting_answers", "answers that wait for a slot")
        self._memory = metrics.Gauge(
            "process_resident_memory_bytes", "resident memory of the replica's process"
        )
        self._tokens = _Totals("mara_tokens_total", "tokens answered", "kind")
        self._examined = _Totals(
            "mara_candidates_examined_total",
            "candidates that finished answers needed; tokens / examined is the accept rate",
            "kind",
        )
        self._looked = _Totals(
            "mara_candidates_looked_total", "candidates put through the LLM for them", "kind"
        )
        self._answers = _Totals("mara_answers_total", "answers by finish reason", "reason")
        self._closed = threading.Event()
        self._reporter: threading.Thread | None = None

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """Count a request and the time until the last byte of its answer."""
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def first_token(self, seconds: float) -> None:
        """Count the time until a request had its first token."""
        self._first_token.observe(seconds)

    def watch(self, loop: DecodeLoop) -> None:
        """Report on a decode loop from now on, for the last time at `close`."""
        self._reporter = threading.Thread(
            target=self._keep_reporting, args=(loop,), name="endpoint-metrics", daemon=True
        )
        self._reporter.start()

    def close(self) -> None:
        """Report for the last time."""
        self._closed.set()
        if self._reporter is not None:
            self._reporter.join()

    def _keep_reporting(self, loop: DecodeLoop) -> None:
        while not self._closed.wait(_REPORT_S):
            self._report(loop)
        self._report(loop)

    def _report(self, loop: DecodeLoop) -> None:
        self._slots.set(loop.num_slots)
        self._in_use.set(loop.in_use)
        self._waiting.set(loop.waiting)
        self._memory.set(psutil.Process().memory_info().rss)
        self._tokens.raise_to(loop.tokens)
        self._examined.raise_to(loop.examined)
        self._looked.raise_to(loop.looked)
        self._answers.raise_to(loop.finished)


class _Totals:
    """A counter by one label that is told totals; Ray's takes what was added."""

    def __init__(self, name: str, description: str, label: str) -> None:
        self._counter = metrics.Counter(name, description, (label,))
        self._label = label
        self._told: Counter[str] = Counter()

    def raise_to(self, totals: Mapping[str, int]) -> None:
        for value, total in dict(totals).items():
            if total > self._told[value]:
                self._counter.inc(total - self._told[value], {self._label: value})
                self._told[value] = total
