"""Two systems' answers to the same prompts, judged on two axes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mara_rl.metrics.preference import PreferenceRate, axis_outcomes, outcomes, preference_rate
from mara_rl.metrics.text_quality import distinct_n, is_empty, is_refusal, median_length


@dataclass(frozen=True)
class JudgedAnswers:
    """One system's answers (N) and their scores by axis: ``reward`` and ``cost``, each (N,)."""

    texts: Sequence[str]
    scores: Mapping[str, np.ndarray]

    def subset(self, rows: np.ndarray) -> "JudgedAnswers":
        """The answers at these indices."""
        return JudgedAnswers(
            [self.texts[i] for i in rows], {axis: s[rows] for axis, s in self.scores.items()}
        )


def unscored(*systems: Mapping[str, np.ndarray]) -> dict[int, str]:
    """The answers (by index) that one of these scores by axis, each (N,), is not finite for.

    With the axis, of several the first.
    """
    found: dict[int, str] = {}
    for scores in systems:
        for axis, values in scores.items():
            for row in np.flatnonzero(~np.isfinite(values)):
                found.setdefault(int(row), axis)
    return dict(sorted(found.items()))


def rates(
    aligned: JudgedAnswers, base: JudgedAnswers, *, seed: int = 0
) -> dict[str, PreferenceRate]:
    """Net preference rates of ``aligned`` over ``base``: on both axes, and on each alone.

    ``both``: win = better on both axes, lose = worse on both. ``helpful``: higher reward wins.
    ``harmless``: lower cost wins.
    """
    a, b = aligned.scores, base.scores
    per_axis = {
        "both": outcomes(a["reward"], b["reward"], a["cost"], b["cost"]),
        "helpful": axis_outcomes(a["reward"], b["reward"], better="higher", axis="reward"),
        "harmless": axis_outcomes(a["cost"], b["cost"], better="lower", axis="cost"),
    }
    return {name: preference_rate(result, seed=seed) for name, result in per_axis.items()}


def text_figures(texts: Sequence[str]) -> dict[str, float]:
    """Refusal share, empty share, median length in words and distinct-2 of answers."""
    return {
        "refusal_share": float(np.mean([is_refusal(text) for text in texts])),
        "empty_share": float(np.mean([is_empty(text) for text in texts])),
        "median_words": float(median_length(texts)),
        "distinct_2": float(distinct_n(texts, 2)),
    }


def summary(
    aligned: JudgedAnswers,
    base: JudgedAnswers,
    kinds: Sequence[str],
    *,
    judged: tuple[JudgedAnswers, JudgedAnswers] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures, for all prompts and for each kind of prompt (``kinds`` (N,)).

    ``judged`` holds the same answers (aligned, base) under independent judges.
    """
    result: dict[str, Any] = {}
    for kind in ("all", *sorted(set(kinds))):
        rows = np.flatnonzero([kind in ("all", k) for k in kinds])
        part: dict[str, Any] = {
            "n": len(rows),
            "rates": _plain(rates(aligned.subset(rows), base.subset(rows), seed=seed)),
            "aligned": text_figures(aligned.subset(rows).texts),
            "base": text_figures(base.subset(rows).texts),
        }
        if judged is not None:
            independent = rates(judged[0].subset(rows), judged[1].subset(rows), seed=seed)
            part["judge_rates"] = _plain(independent)
        result[kind] = part
    return result


def examples(
    aligned: JudgedAnswers, base: JudgedAnswers, scales: Mapping[str, float]
) -> dict[str, int]:
    """Indices of the best, median and worst change of (reward − cost), each over its scale."""
    gain = sum(
        sign * (aligned.scores[axis] - base.scores[axis]) / scales.get(axis, 1.0)
        for axis, sign in (("reward", 1.0), ("cost", -1.0))
    )
    order = np.argsort(gain, kind="stable")
    return {"best": int(order[-1]), "median": int(order[len(order) // 2]), "worst": int(order[0])}


def _plain(rated: Mapping[str, PreferenceRate]) -> dict[str, dict[str, Any]]:
    return {name: asdict(rate) for name, rate in rated.items()}
