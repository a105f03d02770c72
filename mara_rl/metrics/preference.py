"""Which of two answers is preferred, and how sure a preference rate over many prompts is.

Everywhere A is the side under test and B the one it is compared with, answer by answer to the same
prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mara_rl.common.errors import ConfigError, DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PreferenceRate:
    """Net wins of A over B: ``rate`` = 100 (wins − losses) / n, in points from −100 to 100.

    Attributes:
        low, high: bounds of its 95 % interval, in points too.
        n: prompts.
        wins, losses, ties: prompts, one with several answers by shares.
        won, lost: prompts that on balance are won or lost.
        p_value: `sign_test` of these.
    """

    rate: float
    low: float
    high: float
    n: int
    wins: float
    losses: float
    ties: float
    won: int
    lost: int
    p_value: float

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        """The rate that ``asdict`` made these figures of; others among them play no part."""
        return cls(**{field.name: figures[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        """``+34.0 [+21.0, +47.0]``."""
        rate, low, high = (
            f"{round(points, 1) + 0.0:+.1f}"  # + 0.0 turns −0.0 into 0.0
            for points in (self.rate, self.low, self.high)
        )
        return f"{rate} [{low}, {high}]"


def outcomes(
    reward_a: ArrayLike, reward_b: ArrayLike, cost_a: ArrayLike, cost_b: ArrayLike
) -> dict[str, Floats]:
    """Outcomes (N, R·Q) of each of R answers of A against each of Q of B to the same N prompts.

    ``helpful``: +1 where A's reward is higher, −1 lower, 0 equal. ``harmless``: the same of a lower
    cost. ``both``: +1 where A is better on both axes, −1 worse on both, else 0. Scores are (N, R)
    of A and (N, Q) of B. Raises DataError for a score that is not finite, naming its prompt's
    index, and for shapes that do not fit.
    """
    helpful = _signs(reward_a, reward_b, "reward")
    harmless = -_signs(cost_a, cost_b, "cost")
    if helpful.shape != harmless.shape:
        raise DataError(
            f"{len(helpful)} reward and {len(harmless)} cost scores; expected equally many"
        )
    return {
        "both": np.where(helpful == harmless, helpful, 0.0),
        "helpful": helpful,
        "harmless": harmless,
    }


def preference_rate(
    outcomes: ArrayLike, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> PreferenceRate:
    """The preference rate of paired outcomes (N,) of −1, 0, +1, with its bootstrap interval.

    The interval is the percentile one over ``resamples`` resamples of the N prompts, each keeping
    its pair together. The rate depends on a resample's counts alone, so these are drawn at once
    as multinomials; memory is O(resamples) whatever N is. Where all outcomes are the same every
    resample is, and the interval has no width even for small N: see `sign_test` there.

    Raises DataError when there is no outcome or one is not −1, 0 or 1; ConfigError when
    ``resamples`` < 1 or ``confidence`` is not between 0 and 1.
    """
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; expected 1 or more")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected between 0 and 1")
    values = np.asarray(outcomes)
    if values.ndim != 1 or values.size == 0:
        raise DataError(f"outcomes has shape {values.shape}; expected (N,) with N ≥ 1")
    bad = np.flatnonzero(~np.isin(values, (-1, 0, 1)))
    if bad.size:
        raise DataError(f"outcomes[{bad[0]}] is {values[bad[0]]}; expected -1, 0 or 1")

    n = len(values)
    wins, losses = int(np.sum(values == 1)), int(np.sum(values == -1))
    counts = np.array([wins, losses, n - wins - losses])
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, (tail, 1 - tail))
    return PreferenceRate(
        rate=100 * (wins - losses) / n,
        low=100 * float(low),
        high=100 * float(high),
        n=n,
        wins=float(wins),
        losses=float(losses),
        ties=float(n - wins - losses),
        won=wins,
        lost=losses,
        p_value=sign_test(wins, losses),
    )


def result_line(rate: PreferenceRate) -> str:
    """The one line scripts read: ``preference rate: +34.0 [+21.0, +47.0] (n=120)``."""
    return f"preference rate: {rate} (n={rate.n})"


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of a split this uneven, were wins and losses equally likely.

    Ties carry no information and are left out; without any win or loss the value is 1. Raises
    DataError for a negative count.
    """
    if wins < 0 or losses < 0:
        raise DataError(f"wins is {wins}, losses is {losses}; expected counts of 0 or more")
    n, fewer = int(wins) + int(losses), min(int(wins), int(losses))
    ways = total = 1  # ways: n choose i; Python integers, which do not overflow
    for i in range(fewer):
        ways = ways * (n - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def _signs(a: ArrayLike, b: ArrayLike, axis: str) -> Floats:
    """+1, 0, −1 as A (N, R) is above, equal to, below B (N, Q): (N, R·Q). Not subtracted: the
    difference of two scores may round to 0 or overflow."""
    left, right = _finite(a, f"{axis}_a"), _finite(b, f"{axis}_b")
    if len(left) != len(right):
        raise DataError(
            f"{len(left)} {axis}_a and {len(right)} {axis}_b scores; expected equally many"
        )
    left, right = left[:, :, None], right[:, None, :]
    signs = (left > right).astype(np.float64) - (left < right)
    return signs.reshape(len(left), -1)


def _finite(scores: ArrayLike, name: str) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2:
        raise DataError(f"{name} has shape {values.shape}; expected (N, R)")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise DataError(f"{name}[{row}] is {values[row, column]}; expected a finite score")
    return values
