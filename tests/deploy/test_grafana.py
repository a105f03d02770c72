"""The Grafana dashboard asks for metrics that something exports, and its panels are well-formed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray_metrics import one_ray_node

from services.endpoint.endpoint_metrics import EndpointMetrics

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "mara-rl.json"
FUNCTIONS = {"histogram_quantile", "increase", "rate", "max", "sum", "by", "le"}


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def metric_names(expression: str) -> set[str]:
    """Names in a PromQL expression, without functions, labels and what stands in braces."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]{2,}", bare)) - FUNCTIONS


@pytest.fixture(scope="module")
def own_metrics() -> dict[str, set[str]]:
    """Names of the endpoint's samples on Ray's page, and their labels, after one request."""
    loop: Any = SimpleNamespace(
        num_slots=1,
        in_use=0,
        waiting=0,
        tokens={"base": 1, "aligned": 1},
        examined={"base": 1, "aligned": 1},
        looked={"base": 1, "aligned": 1},
        finished={"stop": 1},
    )
    with one_ray_node() as node:
        metrics = EndpointMetrics()
        metrics.watch(loop)
        metrics.request_done("/v1/chat/completions", 200, 0.1)
        metrics.first_token(0.1)
        metrics.close()
    families = text_string_to_metric_families(generate_latest(node.registry).decode())
    return {s.name: set(s.labels) for family in families for s in family.samples}


@pytest.fixture(scope="module")
def ray_metrics() -> set[str]:
    """What the panels of Ray's own dashboards, of the installed version, ask for."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*_panels.py"))
    return set(re.findall(r"\bray_[a-z0-9_]+", text))


def test_every_metric_is_exported_by_something(
    own_metrics: dict[str, set[str]], ray_metrics: set[str]
) -> None:
    used = {name for _, expression in expressions() for name in metric_names(expression)}
    assert len(used) > 15
    unknown = used - own_metrics.keys() - ray_metrics
    assert not unknown
    assert (
        own_metrics.keys()
        - {
            "ray_mara_candidates_looked_total",  # what speed costs, not a state to watch
            "ray_mara_request_seconds_count",
            "ray_mara_request_seconds_sum",
            "ray_mara_time_to_first_token_seconds_count",
            "ray_mara_time_to_first_token_seconds_sum",
        }
        <= used
    ), "a metric of the endpoint has no panel"


def test_gauges_of_the_decoder_are_added_over_the_replicas() -> None:
    gauges = {f"ray_mara_{name}" for name in ("slots", "slots_in_use", "waiting_answers")}
    found = {expr for _, expr in expressions() if metric_names(expr) & gauges}
    assert found == {f"sum({name})" for name in gauges}


def test_prometheus_scrapes_the_port_that_ray_starts_with() -> None:
    deploy = DASHBOARD.parents[1]
    config = yaml.safe_load((deploy / "prometheus.yaml").read_text())
    ports = {
        job["job_name"]: {
            target.rpartition(":")[2] for target in job["static_configs"][0]["targets"]
        }
        for job in config["scrape_configs"]
    }
    assert ports == {"ray": {"8080"}}
    for file in (deploy / "compose.yaml", deploy / "ray-cluster.yaml"):
        text = file.read_text()
        starts = re.findall(r"ray start --|- start\n", text)
        assert text.count("--metrics-export-port=8080") == len(starts) > 0, file.name


def test_labels_are_those_of_the_metric(own_metrics: dict[str, set[str]]) -> None:
    for title, expression in expressions():
        matched = set(re.findall(r"(\w+)!?=~?\"", expression))
        grouped = matched | {
            label.strip()
            for group in re.findall(r"\bby \(([^)]*)\)", expression)
            for label in group.split(",")
        }
        for name in metric_names(expression) & own_metrics.keys():
            assert grouped <= own_metrics[name], title


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
