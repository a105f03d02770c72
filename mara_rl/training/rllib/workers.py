"""The actors of a run that RLlib starts: its algorithm, learners and rollout actors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from mara_rl.training.faults.time_limit import time_limit
from mara_rl.training.rllib.learners import Learners
from mara_rl.training.rllib.ppo import AcceptPPO, build_algorithm
from mara_rl.training.rllib.rollout_group import RolloutGroup
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.session import actor_plan
from services.cluster.ray_session import await_room
from services.prompt_queue.prompt_source import PromptSourceConfig


@dataclass(frozen=True)
class Workers:
    """An algorithm and the two sides of it."""

    algorithm: AcceptPPO
    learners: Learners
    runners: RolloutGroup


@contextlib.contextmanager
def started_workers(run: RunContext, prompts: PromptSourceConfig) -> Iterator[Workers]:
    """Start them where there is room, for the length of a ``with`` block.

    Raises ConfigError without room for them within ``rollouts.placement_timeout_s``, and
    RetryableError when they are not ready within ``ppo.no_progress_timeout_s``.
    """
    config = run.config
    await_room(actor_plan(config), config.rollouts.placement_timeout_s)
    limit_s = config.ppo.no_progress_timeout_s
    late = f"rollout actors and learners not ready within {limit_s:g} s (ppo.no_progress_timeout_s)"
    with contextlib.ExitStack() as stack:
        with run.display.phase("loading the LLM", total=1), time_limit(limit_s, late):
            algorithm = build_algorithm(config, run.spec, prompts, run.session.scores)
        stack.callback(algorithm.stop)
        run.check_interrupt()
        runners = RolloutGroup(algorithm, config)
        stack.callback(runners.stop)
        yield Workers(algorithm, Learners(algorithm, run.spec, config, run.display), runners)
