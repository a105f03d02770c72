"""The agent's and critic's weights inside RLlib's learner group."""

from typing import Any

import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE

from mara_rl.agent import AcceptNetwork, Agent, AgentSpec
from mara_rl.training.actor_process import kill_process

MODULE_ID = "default_policy"
_COMPONENTS = [f"{COMPONENT_LEARNER}/{part}" for part in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)]


class LearnerWeights:
    """Reads and writes the learner's state, and hands it to the rollout actors."""

    def __init__(self, algorithm: Any, spec: AgentSpec) -> None:
        self._algorithm = algorithm
        self._spec = spec

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state, numpy arrays and plain values."""
        return self._algorithm.learner_group.get_state(components=_COMPONENTS)

    def load_state(self, state: dict[str, Any]) -> None:
        """Set what `state` returned and sync the actors."""
        self._algorithm.learner_group.set_state(state)
        self._sync()

    def learners_alive(self) -> bool:
        """Whether every learner answers."""
        group = self._algorithm.learner_group
        answers = list(group.foreach_learner(lambda learner: True))
        return len(answers) == max(1, len(group)) and all(answer.ok for answer in answers)

    def kill_learners(self) -> None:
        """SIGKILL to the remote learners: RLlib waits for ever for one that hangs."""
        for actor in self._algorithm.learner_group._worker_manager.actors().values():
            kill_process(actor)

    def agent(self) -> Agent:
        """A copy of the agent as it is now."""
        agent = Agent(self._spec)
        agent.load_state_dict(
            {
                key.removeprefix("agent."): torch.as_tensor(value)
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
        self._algorithm.learner_group.set_weights({MODULE_ID: weights})
        self._sync()

    def _weights(self) -> dict[str, Any]:
        return self._algorithm.learner_group.get_weights(module_ids=[MODULE_ID])[MODULE_ID]

    def _sync(self) -> None:
        self._algorithm.env_runner_group.sync_weights(
            from_worker_or_learner_group=self._algorithm.learner_group,
            policies=[MODULE_ID],
            timeout_seconds=self._algorithm.config.sample_timeout_s,
            inference_only=True,
        )
