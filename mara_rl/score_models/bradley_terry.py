"""Fitting a linear score head to preference pairs, and judging it on pairs it has not seen."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mara_rl.score_models.pairs import Pair


class Accuracy(NamedTuple):
    """The share of pairs whose chosen answer scored better; an equal score counts as half."""

    correct: float
    pairs: int

    @property
    def rate(self) -> float:
        return self.correct / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the rate."""
        z2 = 1.96**2
        centre = (self.correct + z2 / 2) / (self.pairs + z2)
        spread = self.rate * (1 - self.rate) / self.pairs + z2 / (4 * self.pairs**2)
        half = 1.96 * math.sqrt(spread) / (1 + z2 / self.pairs)
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n={self.pairs})"


def accuracy_by_kind(pairs: Sequence[Pair], margins: Tensor) -> dict[str, Accuracy]:
    """Accuracies of score margins (N,), better minus worse, by kind of pair; "all" is first."""
    points = (margins > 0).double() + 0.5 * (margins == 0).double()
    kinds = sorted({pair.kind for pair in pairs})
    result = {"all": Accuracy(float(points.sum()), len(pairs))}
    if len(kinds) > 1:
        for kind in kinds:
            chosen = torch.tensor([pair.kind == kind for pair in pairs])
            result[kind or "unnamed"] = Accuracy(float(points[chosen].sum()), int(chosen.sum()))
    return result


def fit_direction(differences: Tensor, l2: float) -> Tensor:
    """The weights w (H,) that minimise mean log(1 + exp(−d·w)) + l2/2 |w|² over ``differences``.

    ``differences`` (N, H) are features of the better minus the worse answer. float64.
    """
    d = differences.double()
    weights = torch.zeros(d.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.softplus(-(d @ weights)).mean() + l2 / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def fit_head(better: Tensor, worse: Tensor, l2: float, *, sign: float = 1.0) -> nn.Linear:
    """A linear head for features (N, H) whose scores of these answers have mean 0 and variance 1.

    Features are divided by their standard deviation while fitting. ``sign`` −1 gives the better
    answers the lower scores.
    """
    features = torch.cat([better, worse]).double()
    scale = features.std(dim=0).clamp_min(1e-6)
    weights = sign * fit_direction((better - worse).double() / scale, l2) / scale
    scores = features @ weights
    spread = scores.std().clamp_min(1e-12)
    head = nn.Linear(features.shape[1], 1).requires_grad_(False)
    head.weight.copy_((weights / spread).float())
    head.bias.copy_((-scores.mean() / spread).float())
    return head


def folds_of(pairs: Sequence[Pair], folds: int, seed: int) -> Tensor:
    """The fold (N,) of each pair; pairs of one prompt share theirs."""
    return torch.tensor([_hash(pair.prompt, seed) % folds for pair in pairs])


def half_of(pairs: Iterable[Pair], half: str) -> list[Pair]:
    """The pairs of half ``a`` or ``b`` of all prompts, for two models that share no pair."""
    return [pair for pair in pairs if "ab"[_hash(pair.prompt, "half") % 2] == half]


def out_of_fold_margins(folds: Tensor, fit: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Margins (N, …) of every pair by models that did not see its fold.

    ``fit`` gets masks (N,) of the pairs to fit and to judge, and returns the latter's margins.
    """
    present = folds.unique()
    judged = torch.cat([fit(folds != fold, folds == fold) for fold in present])
    rows = torch.cat([(folds == fold).nonzero().squeeze(1) for fold in present])
    return judged[rows.argsort()]


def _hash(text: str, salt: object) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}:{text}".encode()).digest()[:8], "big")
