"""The agent and its critic as an RLlib module."""

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from envs.observation import BASE_LOGIT, FORCED, decode_state
from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.training.rllib.critic import Critic

NEVER = -1e9
"""Logit of rejecting where there is no choice: log π(accept), KL and entropy are then 0."""


class AcceptModule(TorchRLModule, ValueFunctionAPI, InferenceOnlyAPI):
    """Policy over {reject, accept} from `Agent`; a separate `Critic` on the learner only.

    ``model_config``: ``{"agent": AgentSpec as a dict}``.
    """

    def setup(self) -> None:
        config: Any = self.model_config
        self.spec = AgentSpec(**config["agent"])
        self.agent = Agent(self.spec)
        if not self.inference_only:
            self.critic = Critic(self.spec.hidden_size, prefix=self.spec.needs_prefix)

    def get_non_inference_attributes(self) -> list[str]:
        return ["critic"]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        accept_logit, forced = self._accept_logit(batch[Columns.OBS])
        logits = torch.stack([torch.zeros_like(accept_logit), accept_logit], dim=-1)
        no_choice = torch.tensor([NEVER, 0.0], device=logits.device)
        return {Columns.ACTION_DIST_INPUTS: torch.where(forced[..., None], no_choice, logits)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        observation = batch[Columns.OBS]
        with torch.no_grad():
            accept_logit, forced = self._accept_logit(observation)
            accept = torch.where(forced, 1.0, torch.sigmoid(accept_logit))
        return self.critic(
            decode_state(observation["h"]), _prefix(observation), observation["x"], accept
        )

    def _accept_logit(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = observation["x"]
        logit = self.agent.accept_logit(
            decode_state(observation["h"]), x[..., BASE_LOGIT], _prefix(observation)
        )
        return logit, x[..., FORCED] > 0.5


def _prefix(observation: dict[str, Tensor]) -> Tensor | None:
    return decode_state(observation["h_prefix"]) if "h_prefix" in observation else None
