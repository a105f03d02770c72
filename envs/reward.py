"""The terminal reward: weighted scores of a finished answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RewardSpec:
    """Σ_i weights[i] · score_i / scales[i] − baseline (MARA eq. 13).

    ``scales`` are the scores' standard deviations on the base LLM's answers (1 where not given).
    Beaver-style costs are lower-is-safer, so their weight is negative.
    """

    weights: Mapping[str, float]
    scales: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
        """Rewards (N,), float64, of scores (N, len(names)); NaN where any needed score is."""
        factors = [self.weights.get(name, 0.0) / self.scales.get(name, 1.0) for name in names]
        return scores @ np.asarray(factors, dtype=np.float64)
