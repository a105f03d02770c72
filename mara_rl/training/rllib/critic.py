"""The critic: the value of a state in which a candidate is still pending."""

import torch
from torch import Tensor, nn

from envs.observation import LOG_P, MASS_LEFT, TOKENS_LEFT, X_FIELDS, K
from mara_rl.agents.agent import AcceptNetwork


class Critic(nn.Module):
    """V(s) = a_k · Q(h_k) + (1 − a_k) · V_rest, a_k the agent's acceptance probability.

    Q(h) is the value of the sequence that ends in the token with state h; both parts get a
    correction from the scalars of the observation. V_rest, the value after a rejection, is Q of the
    prefix where the observation carries it, else a network of its own over h_k.
    """

    def __init__(self, hidden_size: int, *, prefix: bool) -> None:
        super().__init__()
        self.q = AcceptNetwork(hidden_size, outputs=1)
        self.rest = None if prefix else AcceptNetwork(hidden_size, outputs=1)
        output = nn.Linear(64, 2)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.scalars = nn.Sequential(nn.Linear(len(X_FIELDS), 64), nn.ReLU(), output)

    def forward(self, h: Tensor, h_prefix: Tensor | None, x: Tensor, accept: Tensor) -> Tensor:
        """Values (B,) of states h (B, H), x (B, X) with acceptance probabilities (B,)."""
        correction = self.scalars(_scaled(x))
        accepted = self.q(h)[..., 0] + correction[..., 0]
        rest = self.q(h_prefix) if self.rest is None else self.rest(h)
        return accept * accepted + (1 - accept) * (rest[..., 0] + correction[..., 1])


def _scaled(x: Tensor) -> Tensor:
    """The scalars brought to about unit size."""
    scale = torch.ones(x.shape[-1], device=x.device)
    scale[LOG_P], scale[K], scale[TOKENS_LEFT] = 0.2, 0.1, 0.02
    scale[MASS_LEFT] = 2.0
    return (x * scale).clamp(-5, 5)
