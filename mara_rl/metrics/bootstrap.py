"""Paired bootstrap over prompts: every figure sees the same resamples."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mara_rl.common.errors import DataError

_CHUNK = 500  # resamples held as floats at a time


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, float]:
        return asdict(self)


class PairedBootstrap:
    """B resamples of N prompts, drawn once; a prompt brings all its figures along."""

    def __init__(self, num_prompts: int, *, resamples: int = 10_000, seed: int = 0) -> None:
        if num_prompts < 1:
            raise DataError(f"num_prompts is {num_prompts}; expected 1 or more")
        rng = np.random.default_rng([seed, num_prompts])
        even = np.full(num_prompts, 1 / num_prompts)
        # How often each prompt occurs in each resample (B, N); more than 65,535 times it never is.
        self._times = np.concatenate(
            [
                rng.multinomial(num_prompts, even, size=min(_CHUNK, resamples - first)).astype(
                    np.uint16
                )
                for first in range(0, resamples, _CHUNK)
            ]
        )

    def means(self, columns: NDArray[np.float64], rows: NDArray[Any] | None = None) -> Any:
        """Means (B, F) of ``columns`` (N, F) in every resample; ``rows`` keeps some prompts alone.

        A resample that holds none of them gives NaN.
        """
        times = self._times if rows is None else self._times[:, rows]
        kept = columns if rows is None else columns[rows]
        means = np.empty((len(times), kept.shape[1]))
        for first in range(0, len(times), _CHUNK):
            part = times[first : first + _CHUNK].astype(np.float64)
            with np.errstate(invalid="ignore"):
                means[first : first + _CHUNK] = part @ kept / part.sum(1, keepdims=True)
        return means

    def mean(self, values: ArrayLike, rows: NDArray[Any] | None = None) -> Interval:
        """The mean of one number a prompt (N,), with its percentile interval."""
        column = np.asarray(values, np.float64)[:, None]
        kept = column if rows is None else column[rows]
        return interval(float(kept.mean()), self.means(column, rows)[:, 0])

    def length_controlled(
        self, difference: ArrayLike, length: ArrayLike, rows: NDArray[Any] | None = None
    ) -> Interval:
        """The score difference that a line through (length difference, score difference) has at 0.

        The intercept of ordinary least squares over prompts (N,), fitted in every resample: what is
        left of a gain where neither answer is longer. Where all lengths differ alike there is no
        line: the mean difference.
        """
        d, x = np.asarray(difference, np.float64), np.asarray(length, np.float64)
        columns = np.stack([d, x, x * d, x * x], axis=1)
        kept = columns if rows is None else columns[rows]
        value = _intercept(kept.mean(0)[None])[0]
        return interval(float(value), _intercept(self.means(columns, rows)))


def interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    """``value`` with the 2.5 % and 97.5 % quantiles of what the resamples gave (B,)."""
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _intercept(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """OLS intercepts (B,) from the means (B, 4) of d, x, x·d and x²."""
    d, x, xd, xx = moments.T
    variance = xx - x * x
    flat = variance <= 1e-12 * np.maximum(1.0, xx)
    slope = np.where(flat, 0.0, (xd - x * d) / np.where(flat, 1.0, variance))
    return d - slope * x
