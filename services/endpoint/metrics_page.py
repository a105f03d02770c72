"""``GET /metrics``: the endpoint's metrics of all replicas, read from Ray's port on each node."""

import asyncio
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import ray
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mara_rl.common.errors import first_line
from services.http.api_errors import ApiError

logger = logging.getLogger(__name__)

_PREFIX = "ray_"  # before every name on Ray's pages
_OWN_LINE = re.compile(rf"(# (HELP|TYPE) )?{_PREFIX}(mara|process)_")
_LABELS = ("application", "deployment", "replica", "route", "status", "kind", "reason", "le")
_TIMEOUT_S = 5.0


async def metrics_page() -> bytes:
    """In Prometheus' text format. A node that does not answer is left out, and logged.

    Raises ApiError 503 where none does.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            nodes = await asyncio.to_thread(ray.nodes)
    except TimeoutError as error:
        raise _unavailable("Ray does not say which nodes there are") from error
    asked = [node for node in nodes if node["Alive"] and node["MetricsExportPort"] > 0]
    async with httpx2.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        pages = await asyncio.gather(*(_page_of(node, client) for node in asked))
    found = [page for page in pages if page is not None]
    if not found:
        raise _unavailable("no node of the Ray cluster gives its metrics")
    return generate_latest(_EndpointMetricsOf(found))


def _unavailable(why: str) -> ApiError:
    return ApiError(503, why, code="metrics_unavailable")


async def _page_of(node: dict[str, Any], client: httpx2.AsyncClient) -> str | None:
    host, port = node["NodeManagerAddress"], node["MetricsExportPort"]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    try:
        return (await client.get(url)).raise_for_status().text
    except httpx2.HTTPError as error:
        logger.warning("no metrics from the Ray node at %s: %s", url, first_line(error))
        return None


class _EndpointMetricsOf(Collector):
    """What is the endpoint's on pages of Ray, under the names and labels it was recorded with."""

    def __init__(self, pages: Iterable[str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for page in self._pages:
            for found in text_string_to_metric_families(_own_lines(page)):
                name = found.name.removeprefix(_PREFIX)
                family = families.setdefault(name, Metric(name, found.documentation, found.type))
                for sample in found.samples:
                    labels = {key: sample.labels[key] for key in _LABELS if key in sample.labels}
                    own = sample.name.removeprefix(_PREFIX)
                    family.samples.append(sample._replace(name=own, labels=labels))
        yield from families.values()


def _own_lines(page: str) -> str:
    """A page of Ray has hundreds of kilobytes, and parsing is slow."""
    return "".join(f"{line}\n" for line in page.splitlines() if _OWN_LINE.match(line))
