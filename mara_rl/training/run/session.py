"""Everything a run stands on, opened in order and closed again: Ray, Redis, scores, MLflow."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tenacity import Retrying

from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.tracking.store import tracking_uri
from mara_rl.training.config import TrainConfig
from mara_rl.training.run.run_names import score_sources
from services.cluster.ray_session import await_room, check_resources, ray_session
from services.cluster.redis_server import redis_url
from services.cluster.replica_config import resource_bundle
from services.prompt_queue.prompt_source import PromptSourceConfig
from services.scoring.score_client import ScoreClientConfig
from services.scoring.score_service import (
    ScoreServiceConfig,
    check_hosts,
    delete_scores,
    deploy_scores,
    deployed_score,
)
from services.scoring.score_sources import check_url


@dataclass(frozen=True)
class Session:
    """The addresses a run needs."""

    prompts: PromptSourceConfig
    scores: ScoreClientConfig
    tracking_uri: str


@contextlib.contextmanager
def training_session(
    config: TrainConfig, run: str, patience: Retrying, display: Display, *, single_node: bool
) -> Iterator[Session]:
    """Open the services of a run; embedded ones only where this process started Ray itself.

    Raises ConfigError naming what is missing before anything heavy starts: the resource plan is
    checked against the cluster first. On a cluster that others share, the score services bear the
    run's name and are deleted at the end; those named by ``scores.<name>.app`` or ``url``
    are left alone.
    """
    with ray_session() as ray, contextlib.ExitStack() as closing:
        alone = ray.owns_cluster or single_node
        if not alone and "MARA_HOME" not in os.environ:
            raise ConfigError(
                "MARA_HOME is not set: on a cluster it must name a folder that every node shares "
                "(--single-node says that there is one node only)"
            )
        check_resources(resource_plan(config))

        def open_redis() -> str:
            return closing.enter_context(redis_url(allow_embedded=alone))

        def give_back(services: Mapping[str, ScoreServiceConfig]) -> None:
            try:
                delete_scores(services)
            except RetryableError as error:  # no reason for a finished run to fail
                display.line(str(error))

        url = patience(open_redis)
        uri = patience(tracking_uri, allow_local=alone)
        sources = score_sources(config, run, shared_cluster=not ray.owns_cluster)
        services = {
            sources[name]: ScoreServiceConfig(
                **score.model_dump(include=set(ScoreServiceConfig.model_fields))
            )
            for name, score in config.scores.items()
            if score.shared is None
        }
        for score in config.scores.values():
            if score.app is not None:
                check_hosts(score.app, score.model)
            if score.url is not None:
                check_url(score.url, score.model)
        timeout_s = config.rollouts.placement_timeout_s
        if not ray.owns_cluster:  # of a run that ends before they are ready, too
            closing.callback(give_back, services)
        lacking = {
            name: service for name, service in services.items() if deployed_score(name) != service
        }
        delete_scores(lacking)  # of an earlier process, with another config
        # For all of it before any of it: two runs would wait for each other's share.
        await_room(_replicas(lacking) + actor_plan(config), timeout_s)
        deploy_scores(services, ready_timeout_s=timeout_s)
        yield Session(
            prompts=PromptSourceConfig(
                url=url,
                seed=config.seed,
                deadline_s=config.prompts.read_timeout_s,
                max_failures=config.prompts.max_failures,
                dead_after_s=config.prompts.dead_after_s,
                heartbeat_s=config.prompts.dead_after_s / 12,
                prefetch=config.rollouts.num_slots,
            ),
            scores=ScoreClientConfig(
                sources=sources,
                deadline_s=config.scoring.deadline_s,
                max_attempts=config.scoring.max_attempts,
            ),
            tracking_uri=uri,
        )


def _replicas(services: Mapping[str, ScoreServiceConfig]) -> list[tuple[str, dict[str, float]]]:
    return [
        (name, service.bundle)
        for name, service in services.items()
        for _ in range(service.num_replicas)
    ]


def resource_plan(config: TrainConfig) -> list[tuple[str, dict[str, float]]]:
    """Every actor that a run starts, with the resources it asks for."""
    own = {name: score for name, score in config.scores.items() if score.shared is None}
    return _replicas(own) + actor_plan(config)


def actor_plan(config: TrainConfig) -> list[tuple[str, dict[str, float]]]:
    """The part of it that RLlib starts: rollout actors and remote learners."""
    rollouts, learner = config.rollouts, config.learner
    runner = resource_bundle(rollouts.num_cpus, rollouts.num_gpus, rollouts.resources)
    remote = resource_bundle(learner.num_cpus, learner.num_gpus, learner.resources)
    runners = [("runners", runner)] * rollouts.num_runners
    return runners + [("learners", remote)] * learner.num_learners
