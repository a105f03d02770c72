"""Score models behind Ray Serve: one application for each score, its calls batched."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import ray
from pydantic import Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from mara_rl.common.errors import ConfigError, RetryableError, first_line
from mara_rl.llm.policy_llm import OptionalDType
from services.cluster.ray_session import amounts, check_resources
from services.cluster.replica_config import ReplicaConfig

if TYPE_CHECKING:
    from mara_rl.score_models.base import ScoreModel

_POLL_S = 0.2
_DESCRIBE_TIMEOUT_S = 30.0


class ScoreServiceConfig(ReplicaConfig):
    """How one score model is hosted."""

    model: str = Field(description="shipped name, checkpoint folder or hub id of the score model")
    max_batch_size: int = Field(16, ge=1, description="pairs in one forward pass")
    batch_wait_timeout_s: float = Field(0.005, ge=0, description="wait for a batch to fill")
    dtype: OptionalDType = None
    forward_timeout_s: float = Field(
        600.0, gt=0, description="a forward pass that takes longer gets its replica replaced"
    )


class ScoreService:
    """One replica: a score model whose forward passes gather pairs from all calls in flight."""

    def __init__(self, config: ScoreServiceConfig) -> None:
        import torch

        torch.set_num_threads(config.torch_threads)
        self._config = config
        self._lock = threading.Lock()
        self._forward_began_s: float | None = None
        self._broken: str | None = None
        self._score_one.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self._score_one.set_batch_wait_timeout_s(config.batch_wait_timeout_s)  # type: ignore[attr-defined]
        self._model = self._load_model()

    async def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        """One score for each (prompt, response) pair; non-finite scores are passed on as such."""
        return list(await asyncio.gather(*(self._score_one(pair) for pair in pairs)))

    async def config(self) -> ScoreServiceConfig:
        """What this service was deployed with."""
        return self._config

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica after repeated errors."""
        if self._broken is not None:
            raise RuntimeError(self._broken)
        began_s = self._forward_began_s
        if began_s is not None and time.monotonic() - began_s > self._config.forward_timeout_s:
            raise RuntimeError(f"forward pass runs for over {self._config.forward_timeout_s:g} s")

    def _load_model(self) -> "ScoreModel":
        from mara_rl.score_models.loading import load_score_model

        device = "cuda" if self._config.num_gpus else "cpu"
        return load_score_model(self._config.model, device=device, dtype=self._config.dtype)

    @serve.batch
    async def _score_one(self, pairs: list[tuple[str, str]]) -> list[float]:
        # In a thread, so that the event loop goes on gathering the next batch and answering
        # health checks.
        return await asyncio.to_thread(self._forward, pairs)

    def _forward(self, pairs: list[tuple[str, str]]) -> list[float]:
        import torch

        with self._lock:  # a cancelled call may leave its forward pass running
            self._forward_began_s = time.monotonic()
            try:
                return self._model.score(pairs)
            except torch.OutOfMemoryError as error:
                raise RetryableError(f"out of GPU memory: {error}") from error
            except torch.AcceleratorError as error:  # no later call on this device can work
                self._broken = f"device is broken: {error}"
                raise RetryableError(self._broken) from error
            finally:
                self._forward_began_s = None


def deploy_scores(
    services: Mapping[str, ScoreServiceConfig], *, ready_timeout_s: float = 120.0
) -> None:
    """Run one Serve application for each score and return when all of them can answer.

    An application that already runs with an equal config is left as it is; one with another config
    is replaced. Nothing listens for HTTP.

    Args:
        services: application name, e.g. ``reward``, to config.
        ready_timeout_s: time for all replicas to be placed and to load their models.

    Raises:
        ConfigError: the cluster is too small (at once), a model cannot be loaded, or not everything
            was ready in time; the applications of this call that do not run are deleted again.
    """
    check_resources(
        [
            (name, config.bundle)
            for name, config in services.items()
            for _ in range(config.num_replicas)
        ]
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    changed = {name: config for name, config in services.items() if deployed_score(name) != config}
    if not changed:
        return
    serve.start(proxy_location="Disabled")
    serve.run_many(
        [
            serve.RunTarget(score_application(config), name=name, route_prefix=None)
            for name, config in changed.items()
        ],
        wait_for_applications_running=False,
    )
    try:
        _wait_until_running(changed, ready_timeout_s)
    except ConfigError:
        delete_scores(name for name in changed if _status(name) != "RUNNING")
        raise


def check_hosts(name: str, model: str) -> None:
    """Raise ConfigError unless the Serve application ``name`` runs and hosts ``model``."""
    config = deployed_score(name)
    if config is None:
        raise ConfigError(
            f"score application {name!r} is {_status(name) or 'not there'}; expected one that runs "
            f"and hosts {model!r}"
        )
    if config.model != model:
        raise ConfigError(f"score application {name!r} hosts {config.model!r}, not {model!r}")


def delete_scores(names: Iterable[str]) -> None:
    """Delete Serve applications by name; those that do not exist are passed over.

    Raises RetryableError, after all were tried, where Serve did not do so.
    """
    kept = {}
    for name in names:
        try:
            if _status(name) is not None:
                serve.delete(name)
        except (RayError, RayServeException, TimeoutError) as error:
            kept[name] = first_line(error)
    if kept:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in kept.items())
        raise RetryableError(f"score applications could not be deleted: {reasons}")


def score_application(config: ScoreServiceConfig) -> serve.Application:
    """The Serve application of one score; also what an ``import_path`` may name."""
    return score_deployment(ScoreService, config).bind(config)


def score_deployment(service: type[ScoreService], config: ScoreServiceConfig) -> serve.Deployment:
    """The deployment of ``service``, to be bound to the config."""
    deployment = serve.deployment(
        # Calls, of one pair at the least: one batch in the model and the next one gathering.
        max_ongoing_requests=2 * config.max_batch_size,
        graceful_shutdown_timeout_s=5.0,  # calls cut off are repeated by their client
        **config.deployment_options(),
    )
    return deployment(service)


def deployed_score(name: str) -> ScoreServiceConfig | None:
    """The config of the score that application ``name`` serves, None when it does not run.

    Raises ConfigError for an application that serves no score, RetryableError for no answer.
    """
    if _status(name) != "RUNNING":
        return None
    try:
        return serve.get_app_handle(name).config.remote().result(timeout_s=_DESCRIBE_TIMEOUT_S)
    except RayTaskError as error:
        raise ConfigError(f"Serve application {name!r} is there already and no score") from error
    except (TimeoutError, RayError, RayServeException) as error:
        raise RetryableError(
            f"score {name!r} runs but did not tell its config within {_DESCRIBE_TIMEOUT_S:g} s"
        ) from error


def _status(name: str) -> str | None:
    application = serve.status().applications.get(name)
    return None if application is None else application.status.value


def _wait_until_running(services: Mapping[str, ScoreServiceConfig], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        applications = serve.status().applications
        for name in services:
            if applications[name].status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ConfigError(f"score {name!r} did not start: {_reason(applications[name])}")
        waiting = [name for name in services if applications[name].status != "RUNNING"]
        if not waiting:
            return
        if time.monotonic() > deadline_s:
            needs = ", ".join(
                f"{name} {services[name].num_replicas} x ({amounts(services[name].bundle)})"
                for name in waiting
            )
            free = {"CPU": 0.0, "GPU": 0.0} | ray.available_resources()
            raise ConfigError(
                f"scores not ready within {timeout_s:g} s: waiting for {needs}; free in the "
                f"cluster: {free['CPU']:g} CPU + {free['GPU']:g} GPU "
                "(where that is enough, a model is still loading)"
            )
        time.sleep(_POLL_S)


def _reason(application: ApplicationStatusOverview) -> str:
    """The last line of what Serve tells of a failure: the error at the end of a traceback."""
    messages = [deployment.message for deployment in application.deployments.values()]
    lines = "\n".join([application.message, *messages]).strip().splitlines()
    return lines[-1].strip()
