"""Learner connectors: the KL to the base LLM as a reward, and advantages."""

from typing import Any

import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from envs.observation import BASE_LOGIT
from mara_rl.training.rllib.iteration_figures import METRICS


class SampledKLReward(ConnectorV2):
    """r_t −= β (log π(a_t) − log r(a_t)) at every decision, r(accept) = r_k.

    The sum of these terms over an episode is the log-ratio of the sampled answer's probability
    under the agent and under the truncated base LLM, whose mean is the KL. The analytic
    KL(a_k ‖ r_k) would have no gradient as a reward.
    """

    def __init__(self, kl_coeff: float) -> None:
        super().__init__()
        self.kl_coeff = kl_coeff

    def __call__(
        self, *, batch: dict[str, Any], episodes: list[Any], metrics: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        total, decisions = 0.0, 0
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            n = len(episode)
            rows = slice(0, n)
            base_logit = episode.get_observations(rows)["x"][:, BASE_LOGIT].astype(np.float64)
            accepted = episode.get_actions(rows) == 1
            log_pi = episode.get_extra_model_outputs(Columns.ACTION_LOGP, rows)
            log_ratio = log_pi - log_bernoulli(base_logit, accepted)
            log_ratio[-1] = 0.0  # the artificial row that carries the bootstrap value
            total, decisions = total + log_ratio.sum(), decisions + n - 1
            rewards = episode.get_rewards(rows) - self.kl_coeff * log_ratio
            self.add_n_batch_items(
                batch, Columns.REWARDS, rewards.astype(np.float32), n, single_agent_episode=episode
            )
        if metrics is not None:
            metrics.log_value((METRICS, "kl_sum"), total, reduce="sum")
            metrics.log_value((METRICS, "kl_decisions"), decisions, reduce="sum")
        return batch


def log_bernoulli(accept_logit: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """log-probability of accepting or rejecting at accept log-odds ``accept_logit``."""
    return -np.logaddexp(0.0, np.where(accepted, -accept_logit, accept_logit))


class StandardizedAdvantages(ConnectorV2):
    """Advantages standardised over real decisions only; the explained variance of the critic.

    GAE's own standardisation counts the artificial last row of every chunk.
    """

    def __call__(
        self, *, rl_module: Any, batch: dict[str, Any], metrics: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        for module_id, columns in batch.items():
            real = columns[Columns.LOSS_MASK]
            targets = columns[Postprocessing.VALUE_TARGETS]
            with torch.no_grad():
                advantages = targets - rl_module[module_id].compute_values(columns)
            used = advantages[real]
            columns[Postprocessing.ADVANTAGES] = (advantages - used.mean()) / used.std(
                correction=0
            ).clamp_min(1e-6)
            if metrics is not None:
                variance = targets[real].var(correction=0).clamp_min(1e-9)
                unexplained = used.var(correction=0) / variance
                metrics.log_value((METRICS, "explained_variance"), 1 - unexplained.item(), window=1)
                metrics.log_value((METRICS, "rows"), int(real.sum()), reduce="sum")
        return batch
