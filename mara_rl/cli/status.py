"""``mara-rl status``: how a run stands, as far as it can be seen from here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mara_rl.cli.prompts import queue_rows

if TYPE_CHECKING:
    from mara_rl.training.run.run_status import RunStatus

_SHOWN = (
    "rollout/reward",
    "rollout/accept_rate",
    "rollout/failed_answers",
    "rollout/scoring_retries",
    "faults/attempts_without_update",
    "learner/kl_per_token",
    "learner/explained_variance",
    "time/iteration_s",
)


def status(
    run: Annotated[str, typer.Argument(help="The run, by name or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as one JSON object.")] = False,
) -> None:
    """Show a run's state, checkpoint, queue, job, services and last metrics.

    What cannot be reached from here is said with its reason and does not change the exit status.
    """
    from mara_rl.training.run.run_status import run_status

    found = run_status(run)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    console = Console()
    if not console.is_terminal:
        for name, value in _rows(found):
            print(f"{name}\t{value}")
        return
    table = Table("", "", show_header=False, title=f"run {found.run}")
    for name, value in _rows(found):
        table.add_row(name, value)
    console.print(table, markup=False)


def _rows(found: "RunStatus") -> Iterator[tuple[str, str]]:
    yield "folder", found.folder
    yield "state", found.state
    if found.outcome is not None:
        yield "agent", found.outcome.agent_uri
        yield "result", found.outcome.preference_rate or "no comparison"
    checkpoint = found.checkpoint
    yield (
        "checkpoint",
        f"iteration {checkpoint.iteration}, {_ago(checkpoint.age_s)}" if checkpoint else "none yet",
    )
    for name, reason in found.torn_checkpoints.items():
        yield f"torn checkpoint {name}", reason
    if "Redis" not in found.unreachable:
        if found.queue is None:
            yield "queue", "none yet"
        else:
            yield "queue", found.queue.queue
            yield from queue_rows(found.queue)
    yield from _ray_rows(found)
    for url, model in found.url_scores.items():
        yield f"score service {url}", model
    yield from _tracking_rows(found)
    for part, reason in found.unreachable.items():
        yield f"{part} not reachable", reason


def _ray_rows(found: "RunStatus") -> Iterator[tuple[str, str]]:
    if found.ray is None:
        return
    for job in found.ray.jobs:
        yield f"job {job.submission_id}", job.status
    for name, states in found.ray.actors.items():
        yield f"actor {name}", _counts(states)
    for name, service in found.ray.services.items():
        yield f"score service {name}", f"{service.status}, replicas: {_counts(service.replicas)}"


def _tracking_rows(found: "RunStatus") -> Iterator[tuple[str, str]]:
    tracking = found.tracking
    if tracking is None:
        return
    yield "MLflow run", f"{tracking.run_id} {tracking.status}"
    if tracking.iteration is None or tracking.age_s is None:
        yield "metrics", "none yet"
        return
    yield "metrics", f"iteration {tracking.iteration}, {_ago(tracking.age_s)}"
    for name, value in tracking.metrics.items():
        if name in _SHOWN or name.startswith("rollout/score_"):
            yield name, f"{value:.4g}"


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"
