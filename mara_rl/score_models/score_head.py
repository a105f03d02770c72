"""The head of a layer-slice score model: linear in the answer, gated by the prompt if wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mara_rl.common.errors import DataError
from mara_rl.score_models.bradley_terry import fit_direction
from mara_rl.score_models.pairs import Pair

GATE_L2 = 0.1


class ScoreHead(nn.Module):
    """score = a·w + c, and with a gate + tanh(p·g + d) (a·v).

    a is the answer's pooled state and p the state right before the answer, both (..., H) float32.
    The gate tells prompts that deserve an answer (−1) from those that do not (+1), so that what
    counts in an answer may depend on which it is.
    """

    def __init__(self, hidden_size: int, *, gated: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        self.gate = nn.Linear(hidden_size, 1) if gated else None
        self.gated = nn.Linear(hidden_size, 1, bias=False) if gated else None

    def forward(self, answer: Tensor, prompt: Tensor) -> Tensor:
        score = self.linear(answer)
        if self.gate is not None and self.gated is not None:
            score = score + torch.tanh(self.gate(prompt)) * self.gated(answer)
        return score.squeeze(-1)


class PairFeatures(NamedTuple):
    """Features (N, H) float32 of N pairs: of both answers, and of the prompt they share."""

    better: Tensor
    worse: Tensor
    prompt: Tensor

    def select(self, chosen: Tensor) -> "PairFeatures":
        """The pairs where ``chosen`` (N,) is set."""
        return PairFeatures(*(feature[chosen] for feature in self))


def fit_head(
    pairs: Sequence[Pair], features: PairFeatures, l2: float, *, gated: bool, sign: float = 1.0
) -> ScoreHead:
    """Fit a head whose scores of these answers have mean 0 and variance 1.

    Features are divided by their standard deviation while fitting. ``sign`` −1 gives the better
    answers the lower scores. Raises DataError for a gate without both kinds of prompts.
    """
    head = ScoreHead(features.better.shape[1], gated=gated).requires_grad_(False)
    answers = torch.cat([features.better, features.worse])
    scale = answers.std(dim=0).clamp_min(1e-6).double()
    differences = (features.better - features.worse) / scale
    size = len(scale)
    if head.gate is not None:
        head.gate = fit_gate(pairs, features.prompt)
        differences = torch.cat(
            [differences, torch.tanh(head.gate(features.prompt)) * differences], 1
        )
    weights = torch.tensor([pair.weight for pair in pairs])
    direction = sign * fit_direction(differences, l2, weights)
    head.linear.weight.copy_(direction[:size] / scale)
    head.linear.bias.zero_()
    if head.gated is not None:
        head.gated.weight.copy_(direction[size:] / scale)
    scores = head(answers, torch.cat([features.prompt, features.prompt]))
    spread = scores.std().clamp_min(1e-12)
    head.linear.bias.copy_(-scores.mean() / spread)
    for layer in (head.linear, head.gated):
        if layer is not None:
            layer.weight.div_(spread)
    return head


def fit_gate(pairs: Sequence[Pair], prompt: Tensor) -> nn.Linear:
    """Half the log-odds that a prompt deserves no answer, by logistic regression, classes balanced.

    A pair without an ``answerable`` mark counts as not answerable. Each prompt counts once.
    """
    rows = torch.tensor(list({pair.prompt: i for i, pair in enumerate(pairs)}.values()))
    answerable = torch.tensor([pairs[int(i)].answerable for i in rows])
    if answerable.all() or not answerable.any():
        raise DataError("a gate needs pairs with answerable true and pairs without; found one kind")
    chosen = prompt[rows].double()
    mean, scale = chosen.mean(dim=0), chosen.std(dim=0).clamp_min(1e-6)
    features = torch.cat([(chosen - mean) / scale, torch.ones(len(rows), 1)], dim=1)
    balance = torch.where(answerable, 1 / answerable.sum(), 1 / (~answerable).sum())
    direction = fit_direction(torch.where(answerable, -1, 1)[:, None] * features, GATE_L2, balance)
    gate = nn.Linear(prompt.shape[1], 1).requires_grad_(False)
    weight = direction[:-1] / scale / 2
    gate.weight.copy_(weight)
    gate.bias.copy_(direction[-1] / 2 - weight @ mean)
    return gate
