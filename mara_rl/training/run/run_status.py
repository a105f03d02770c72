"""How a run stands at this moment: its folder, its queue, its job and services, its metrics."""

import os
import socket
import time
from collections import Counter
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from mara_rl.common.errors import ConfigError, MaraError, first_line
from mara_rl.training.config import TrainConfig
from mara_rl.training.run.checkpoint import STATE_FILE, TrainState, checkpoints_in
from mara_rl.training.run.run_folder import RunFolder, RunOutcome
from mara_rl.training.run.run_names import queue_name, score_sources
from services.prompt_queue.prompt_queue import PromptQueue, QueueStatus

_MLFLOW_TIMEOUT_S = 10
_RAY_TIMEOUT_S = 10
_SCORE_TIMEOUT_S = 5.0  # of each score service: they are asked one after the other
_PROGRESS = "time/iteration_s"  # a metric that every iteration logs
_RAY_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointStatus(_Part):
    """The newest checkpoint whose state can be read."""

    iteration: int
    age_s: float


class JobStatus(_Part):
    """A submission of the run to the cluster."""

    submission_id: str
    status: str
    message: str


class ServiceStatus(_Part):
    """A Serve application that scores for the run."""

    status: str
    replicas: dict[str, int] = Field(description="number by state")
    message: str


class RayStatus(_Part):
    """What the cluster says of the run."""

    jobs: list[JobStatus] = Field(description="submissions, newest first")
    actors: dict[str, dict[str, int]] = Field(description="of a running job: class, state, number")
    services: dict[str, ServiceStatus] = Field(description="by application")


class TrackingStatus(_Part):
    """What MLflow holds of the run."""

    run_id: str
    status: str
    iteration: int | None = Field(description="of the last metrics; None before the first")
    age_s: float | None = Field(description="seconds since then")
    metrics: dict[str, float] = Field(description="the last value of each")


class RunStatus(_Part):
    """All that could be found out; what could not is in ``unreachable`` with the reason."""

    run: str
    folder: str
    state: Literal["training", "done", "stopped", "not begun"] = Field(
        description="training: a process has the folder; stopped: there is a checkpoint"
    )
    outcome: RunOutcome | None
    checkpoint: CheckpointStatus | None
    torn_checkpoints: dict[str, str] = Field(description="newer ones, by name: what is wrong")
    queue: QueueStatus | None
    ray: RayStatus | None
    url_scores: dict[str, str] = Field(description="the model of each score service by URL")
    tracking: TrackingStatus | None
    unreachable: dict[str, str]


def run_status(run: str) -> RunStatus:
    """The status of a run by name or folder.

    Starts nothing but, on a machine by itself, the embedded Redis for the time of the question.
    Raises ConfigError when there is no such run.
    """
    folder, config = RunFolder.open(run)
    outcome = folder.outcome()
    checkpoint, torn = _checkpoint(folder)
    run_id = folder.mlflow_run_id
    unreachable: dict[str, str] = {}
    tracking = queue = ray = None
    try:
        tracking = _tracking(run_id) if run_id else None
    except MaraError as error:
        unreachable["MLflow"] = str(error)
    try:
        queue = _queue(config, folder.name, run_id) if run_id else None
    except MaraError as error:
        unreachable["Redis"] = str(error)
    try:
        ray = _ray(config, folder.name)
    except MaraError as error:
        unreachable["Ray"] = str(error)
    url_scores = {}
    for url in filter(None, (score.url for score in config.scores.values())):
        try:
            url_scores[url] = _hosted_model(url)
        except MaraError as error:
            unreachable[url] = str(error)
    return RunStatus(
        run=folder.name,
        folder=str(folder.path),
        state=_state(folder, outcome, began=checkpoint is not None or bool(torn)),
        outcome=outcome,
        checkpoint=checkpoint,
        torn_checkpoints=torn,
        queue=queue,
        ray=ray,
        url_scores=url_scores,
        tracking=tracking,
        unreachable=unreachable,
    )


def _state(
    folder: RunFolder, outcome: RunOutcome | None, *, began: bool
) -> Literal["training", "done", "stopped", "not begun"]:
    if folder.is_claimed():
        return "training"
    if outcome is not None:
        return "done"
    return "stopped" if began else "not begun"


def _checkpoint(folder: RunFolder) -> tuple[CheckpointStatus | None, dict[str, str]]:
    """The newest checkpoint with a state, its weights unverified; and newer ones without."""
    torn: dict[str, str] = {}
    for path in reversed(checkpoints_in(folder.checkpoints)):
        file = path / STATE_FILE
        try:
            state = TrainState.model_validate_json(file.read_text(encoding="utf-8"))
            age_s = time.time() - file.stat().st_mtime
        except FileNotFoundError:
            if not path.exists():  # a newer one has replaced it meanwhile
                return _checkpoint(folder)
            torn[path.name] = f"no {STATE_FILE}"
        except ValueError as error:
            torn[path.name] = first_line(error)
        else:
            return CheckpointStatus(iteration=state.iteration, age_s=age_s), torn
    return None, torn


def _alone() -> bool:
    """Whether the services of this machine are meant: nothing points to a cluster."""
    return not any(os.environ.get(name) for name in _RAY_ADDRESSES)


def _tracking(run_id: str) -> TrackingStatus:
    from mara_rl.tracking.store import mlflow_calls, mlflow_client, tracking_uri

    uri = tracking_uri(allow_local=_alone())
    client = mlflow_client(uri)
    with mlflow_calls(uri, timeout_s=_MLFLOW_TIMEOUT_S, retries=0):
        found = client.get_run(run_id)
        history = client.get_metric_history(found.info.run_id, _PROGRESS)
    last = max(history, key=lambda metric: (metric.timestamp, metric.step), default=None)
    return TrackingStatus(
        run_id=found.info.run_id,
        status=found.info.status,
        iteration=last.step if last else None,
        age_s=time.time() - last.timestamp / 1000 if last else None,
        metrics=dict(sorted(found.data.metrics.items())),
    )


def _queue(config: TrainConfig, run: str, run_id: str) -> QueueStatus | None:
    from services.cluster.redis_server import connect, redis_errors, redis_url

    name = queue_name(config, run, run_id)
    with (
        redis_url(allow_embedded=_alone()) as url,
        redis_errors(url),
        connect(url, retries=1) as client,
    ):
        return PromptQueue(client, name).status() if PromptQueue.exists(client, name) else None


def _hosted_model(url: str) -> str:
    from services.scoring.score_sources import UrlScores  # imports Ray

    return UrlScores(url).model(_SCORE_TIMEOUT_S)


def _ray(config: TrainConfig, run: str) -> RayStatus:
    """From the dashboard, which needs no place on the cluster."""
    if _alone():
        raise ConfigError(
            "the Ray of a run on one machine answers that run's process only; for a cluster set "
            "RAY_API_SERVER_ADDRESS (http://head:8265)"
        )
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    try:
        address = get_address_for_submission_client(None)
        place = urlsplit(address)  # Ray's clients wait for ever for a host that is not there
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname, port), timeout=_RAY_TIMEOUT_S).close()
        jobs = [
            job
            for job in JobSubmissionClient(address).list_jobs()
            if (job.metadata or {}).get("run") == run
        ]
        jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
        actors: dict[str, Counter[str]] = {}
        for job in jobs:
            if job.status != "RUNNING" or not job.job_id:
                continue
            filters: Any = [("job_id", "=", job.job_id)]
            for actor in list_actors(address, filters=filters, timeout=_RAY_TIMEOUT_S):
                actors.setdefault(actor.class_name, Counter())[actor.state] += 1
        applications = ServeSubmissionClient(address).get_serve_details()["applications"]
    except (RayError, RayStateApiException, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"no answer from Ray's dashboard: {first_line(error)}") from error
    apps = score_sources(config, run, shared_cluster=True).values()
    return RayStatus(
        jobs=[
            JobStatus(
                submission_id=job.submission_id or "",
                status=job.status,
                message=first_line(Exception(job.message or "")) if job.message else "",
            )
            for job in jobs
        ],
        actors={name: dict(states) for name, states in sorted(actors.items())},
        services={name: _service(applications[name]) for name in apps if name in applications},
    )


def _service(application: dict[str, Any]) -> ServiceStatus:
    replicas = (
        replica["state"]
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    )
    return ServiceStatus(
        status=application["status"],
        replicas=dict(Counter(replicas)),
        message=application["message"],
    )
