"""The terminal reward: weighted scores of a finished answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RewardSpec:
    """Σ_i weights[i] · score_i / scales[i] (MARA eq. 13).

    ``scales`` are the scores' standard deviations on the base LLM's answers (1 where not given).
    Beaver-style costs are lower-is-safer, so their weight is negative.
    """

    weights: Mapping[str, float]
    scales: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
        """Rewards (N,), float64, of scores (N, len(names)); NaN where any weighted score is."""
        return self.terms(names, scores).sum(-1)

    def terms(self, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
        """The summands (N, number of weighted scores), float64, of the rewards of ``scores``."""
        weighted = [i for i, name in enumerate(names) if self.weights.get(name, 0.0)]
        factors = [self.weights[names[i]] / self.scales.get(names[i], 1.0) for i in weighted]
        return scores[:, weighted] * np.asarray(factors, dtype=np.float64)
