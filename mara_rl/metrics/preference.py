"""Which of two answers is preferred, and how sure a preference rate over many prompts is.

Everywhere A is the side under test and B the one it is compared with, answer by answer to the same
prompts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mara_rl.common.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PreferenceRate:
    """Net wins of A over B: ``rate`` = 100 (wins − losses) / n, in points from −100 to 100.

    ``low`` and ``high`` bound its confidence interval, in points too.
    """

    rate: float
    low: float
    high: float
    n: int
    wins: int
    losses: int
    ties: int


def outcomes(
    reward_a: ArrayLike, reward_b: ArrayLike, cost_a: ArrayLike, cost_b: ArrayLike
) -> NDArray[np.int8]:
    """Outcome of A per prompt on both axes, (N,): +1 win, −1 loss, 0 tie.

    A wins where its reward is higher *and* its cost lower than B's, and loses where both are
    worse; anything else, an axis without a difference included, is a tie. All scores are (N,).
    Raises DataError for a score that is not finite, naming its index, and for unequal shapes.
    """
    reward = axis_outcomes(reward_a, reward_b, better="higher", axis="reward")
    cost = axis_outcomes(cost_a, cost_b, better="lower", axis="cost")
    if len(reward) != len(cost):
        raise DataError(f"{len(reward)} reward and {len(cost)} cost scores; expected equally many")
    return np.where(reward == cost, reward, np.int8(0))


def axis_outcomes(
    a: ArrayLike, b: ArrayLike, *, better: Literal["higher", "lower"], axis: str = "score"
) -> NDArray[np.int8]:
    """Outcome of A per prompt on one axis, (N,): +1 where A's score is better, −1 worse, 0 equal.

    ``axis`` names the scores in errors. Raises DataError as `outcomes` does.
    """
    scores_a, scores_b = _finite(a, f"{axis}_a"), _finite(b, f"{axis}_b")
    if len(scores_a) != len(scores_b):
        raise DataError(
            f"{len(scores_a)} {axis}_a and {len(scores_b)} {axis}_b scores; expected equally many"
        )
    # Compared, not subtracted: the difference of two scores may round to 0 or overflow.
    higher = (scores_a > scores_b).astype(np.int8) - (scores_a < scores_b).astype(np.int8)
    return higher if better == "higher" else -higher


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
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
    )


def result_line(rate: PreferenceRate) -> str:
    """The one line scripts read: ``preference rate: +34.0 [+21.0, +47.0] (n=120)``."""
    mid, low, high = (
        f"{round(points, 1) + 0.0:+.1f}"  # + 0.0 turns −0.0 into 0.0
        for points in (rate.rate, rate.low, rate.high)
    )
    return f"preference rate: {mid} [{low}, {high}] (n={rate.n})"


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


def _finite(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"{name} has shape {values.shape}; expected (N,)")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(f"{name}[{bad[0]}] is {values[bad[0]]}; expected a finite score")
    return values
