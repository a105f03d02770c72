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


def fit_direction(differences: Tensor, l2: float, weights: Tensor | None = None) -> Tensor:
    """The direction v (H,) that minimises mean log(1 + exp(−d·v)) + l2/2 |v|² over ``differences``.

    ``differences`` (N, H) are features of the better minus the worse answer, ``weights`` (N,) how
    much each counts in the mean. float64.
    """
    d = differences.double()
    share = torch.ones(len(d)).double() if weights is None else weights.double()
    share = share / share.sum()
    direction = torch.zeros(d.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [direction], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = nn.functional.softplus(-(d @ direction))
        value = losses @ share + l2 / 2 * direction.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return direction.detach()


def folds_of(pairs: Sequence[Pair], folds: int, seed: int) -> Tensor:
    """The fold (N,) of each pair; pairs of one prompt share theirs."""
    return torch.tensor([_hash(pair.prompt, seed) % folds for pair in pairs])


def part_of(pairs: Iterable[Pair], first: int, last: int) -> list[Pair]:
    """The pairs of the prompts from percent ``first`` to below ``last`` in a fixed random order.

    Models fitted to parts that do not overlap share no pair and no prompt.
    """
    return [pair for pair in pairs if first <= _hash(pair.prompt, "part") % 100 < last]


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
