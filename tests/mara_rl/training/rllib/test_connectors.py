"""The KL as a reward, and what it makes a single decision converge to."""

import numpy as np
import pytest
import torch

from mara_rl.training.rllib.connectors import log_bernoulli


def test_log_bernoulli() -> None:
    logit = np.array([0.3, -2.0, 30.0])
    accept = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(log_bernoulli(logit, np.ones(3, bool)), np.log(accept), atol=1e-12)
    np.testing.assert_allclose(
        log_bernoulli(logit, np.zeros(3, bool)), np.log1p(-accept), rtol=1e-3
    )


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_one_decision_converges_to_the_optimum(beta: float) -> None:
    """REINFORCE on ΔR · a − β (log π(a) − log r(a)) ends at σ(logit r + ΔR / β)."""
    base, gap = np.array([0.0]), 1.0
    logit = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=2.0 / max(1.0, beta))
    for _ in range(600):
        # Both actions weighted by their probability: the expected update, without noise.
        pi = torch.stack([1 - torch.sigmoid(logit), torch.sigmoid(logit)])
        reward = []
        for accepted in (False, True):
            log_pi = float(log_bernoulli(logit.detach().double().numpy(), np.array([accepted]))[0])
            log_r = float(log_bernoulli(base, np.array([accepted]))[0])
            reward.append(gap * accepted - beta * (log_pi - log_r))
        loss = -(pi[:, 0] * torch.tensor(reward)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = 1 / (1 + np.exp(-gap / beta))
    assert torch.sigmoid(logit).item() == pytest.approx(expected, abs=2e-3)
