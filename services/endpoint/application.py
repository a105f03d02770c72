"""The endpoint as a Ray Serve application: what ``import_path`` of a Serve config names."""

import logging
import time
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from mara_rl.common.errors import first_line
from services.endpoint.endpoint_assembly import log_requests, make_endpoint
from services.endpoint.endpoint_config import EndpointConfig
from services.endpoint.openai_api import create_api

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_SPARE_REQUESTS = 64  # beyond slots and waiting: refusals, health, metrics, the page


@serve.ingress()
class AlignedLLM:
    """One replica. Ray Serve replaces it when its decoder breaks, and lets it drain at its end."""

    def __init__(self, config: EndpointConfig, deployed: int) -> None:
        """``deployed``: when the application was, in seconds since 1970."""
        log_requests(config)
        context = serve.get_replica_context()
        self._endpoint = make_endpoint(
            config,
            deployed=deployed,
            others_loaded=lambda: _running_replicas() > 1,
        )
        # Ray Serve sends requests once this returns. While no replica can answer, the first one
        # says so itself (503); all others come when they have loaded, so nobody notices them.
        if config.alone or (context.rank.rank == 0 and not _running_replicas()):
            self._endpoint.load_in_background()
        else:
            self._endpoint.load()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return create_api(self._endpoint)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica after repeated errors."""
        self._endpoint.check()

    def __del__(self) -> None:
        if hasattr(self, "_endpoint"):
            self._endpoint.close()


def _running_replicas() -> int:
    """How many replicas of the deployment that this process is part of get requests.

    0 where Ray Serve's controller does not say.
    """
    context = serve.get_replica_context()
    try:
        deployments = serve.status().applications[context.app_name].deployments
        states = deployments[context.deployment].replica_states
    except (RayError, RayServeException, KeyError) as error:
        logger.warning("how many replicas run is not known: %s", first_line(error))
        return 0
    return states.get(ReplicaState.RUNNING, 0)


def application(config: EndpointConfig) -> serve.Application:
    """The application; Ray Serve makes ``config`` of an application's ``args``."""
    ongoing = config.slots + config.max_waiting + _SPARE_REQUESTS
    deployment = serve.deployment(
        # The replica itself refuses what is too much, in OpenAI's shape; this is the second line.
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        **config.deployment_options(target_ongoing_requests=config.slots),
    )
    # One time for all replicas, so that their lists of models are the same.
    return deployment(AlignedLLM).bind(config, int(time.time()))
