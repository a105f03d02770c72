"""PPO's learners: their weights in and out, and a limit on how long they may take."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE

from mara_rl.agents.agent import AcceptNetwork, Agent, AgentSpec
from mara_rl.common.display import Display
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.lost_part import LostPart, lost_on_ray_errors
from mara_rl.training.rllib.rollout_group import seed_everything
from services.cluster.ray_internals import kill_learners, lacks_learners

MODULE_ID = "default_policy"
_COMPONENTS = [f"{COMPONENT_LEARNER}/{part}" for part in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)]


class Learners:
    """Reads and writes the learners' state, and hands their weights to the rollout actors.

    Every method raises LostPart where a learner is dead, or is killed because it hangs: RLlib
    waits for ever for one that hangs, and drops what some calls of a dead one raise.
    """

    def __init__(
        self, algorithm: Any, spec: AgentSpec, config: TrainConfig, display: Display
    ) -> None:
        self._algorithm = algorithm
        self._group = algorithm.learner_group
        self._spec = spec
        self._config = config
        self._display = display

    @contextlib.contextmanager
    def watched(self, others_s: float = 0.0) -> Iterator[None]:
        """For a block that calls the learners: LostPart when one of them dies or hangs in it.

        They have ``learner.update_timeout_s``, and ``others_s`` for what else the block waits for.
        """
        update_timeout_s = self._config.learner.update_timeout_s

        def kill() -> None:
            self._display.line(
                f"no answer from the learner within {update_timeout_s:g} s "
                "(learner.update_timeout_s): it is killed"
            )
            kill_learners(self._group)

        timer = threading.Timer(update_timeout_s + others_s, kill)
        timer.daemon = True
        self._check_healthy()
        if len(self._group):  # else the learner is in this process
            timer.start()
        try:
            with lost_on_ray_errors("the learner failed"):
                yield
        finally:
            timer.cancel()
        self._check_healthy()

    def _check_healthy(self) -> None:
        if lacks_learners(self._group):
            raise LostPart("the learner is gone")

    def check(self) -> None:
        """Ask every learner for an answer."""
        with self.watched():
            self._group.foreach_learner(lambda learner: None)

    def seed(self, seed: int) -> None:
        """Seed the generators of every learner."""
        with self.watched():
            self._group.foreach_learner(functools.partial(_seed, seed=seed))

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state, numpy arrays and plain values."""
        with self.watched():
            return self._group.get_state(components=_COMPONENTS)

    def load_state(self, state: dict[str, Any]) -> None:
        """Set what `state` returned and sync the actors."""
        with self.watched():
            self._group.set_state(state)
        self._sync()

    def agent(self) -> Agent:
        """A copy of the agent as it is now."""
        agent = Agent(self._spec)
        agent.load_state_dict(
            {
                key.removeprefix("agent."): torch.tensor(value)
                for key, value in self._weights().items()
                if key.startswith("agent.")
            }
        )
        return agent

    def start_from(self, agent: Agent, value: AcceptNetwork) -> None:
        """Begin PPO at a warm-started agent whose critic knows its value function."""
        weights = dict(self._weights())
        starts = {"agent.": agent, "critic.q.": value, "critic.rest.": value}
        for prefix, module in starts.items():
            for key, tensor in module.state_dict().items():
                if prefix + key in weights:
                    weights[prefix + key] = tensor.numpy()
        with self.watched():
            self._group.set_weights({MODULE_ID: weights})
        self._sync()

    def _weights(self) -> dict[str, Any]:
        with self.watched():
            return self._group.get_weights(module_ids=[MODULE_ID])[MODULE_ID]

    def _sync(self) -> None:
        actors_s = self._config.rollouts.sample_timeout_s
        with self.watched(actors_s):
            self._algorithm.env_runner_group.sync_weights(
                from_worker_or_learner_group=self._group,
                policies=[MODULE_ID],
                timeout_seconds=actors_s,
                inference_only=True,
            )


def _seed(learner: Any, seed: int) -> None:
    seed_everything(seed)
