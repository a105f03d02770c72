"""Scoring in the calling process: a `Scorer` that holds its score models itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mara_rl.common.errors import DataError

if TYPE_CHECKING:
    from mara_rl.score_models.base import ScoreModel


class InProcessScorer:
    """`envs.protocols.Scorer` over models in this process.

    Attributes:
        names: names of the scores, in the order of the columns.
        counters: ``calls``, ``pairs`` and ``non_finite/<name>`` since the start.
    """

    def __init__(self, models: Mapping[str, "ScoreModel"]) -> None:
        self.names = tuple(models)
        self.counters: Counter[str] = Counter()
        self._models = dict(models)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (len(pairs), len(names)), float64; non-finite ones are NaN.

        Raises DataError when a model does not answer with one number for each pair.
        """
        scores = np.full((len(pairs), len(self.names)), np.nan)
        if not pairs:
            return scores
        self.counters.update(calls=1, pairs=len(pairs))
        for column, (name, model) in enumerate(self._models.items()):
            scores[:, column] = finite_or_nan(name, model.score(pairs), len(pairs))
            self.counters[f"non_finite/{name}"] += int(np.isnan(scores[:, column]).sum())
        return scores


def finite_or_nan(name: str, values: Sequence[float], num_pairs: int) -> np.ndarray:
    """One model's answer as a float64 column (num_pairs,) with NaN for everything non-finite.

    Raises DataError naming score ``name`` when the answer is not ``num_pairs`` numbers.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"score {name!r}: expected {num_pairs} numbers, got {error}") from error
    if column.shape != (num_pairs,):
        raise DataError(
            f"score {name!r}: expected {num_pairs} numbers, got an answer of shape {column.shape}"
        )
    return np.where(np.isfinite(column), column, np.nan)
