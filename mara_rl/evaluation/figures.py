"""The figures of an evaluation, each a function of answers or scores.

Shapes: N prompts, R and Q answers a prompt of the methods A and B.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_rl.evaluation.answers import Answer
from mara_rl.metrics.bootstrap import PairedBootstrap
from mara_rl.metrics.preference import Floats, PreferenceRate, preference_rate, sign_test
from mara_rl.metrics.text_quality import (
    distinct_n,
    is_degenerate,
    is_empty,
    is_refusal,
    median_length,
    repetition,
)

BROKEN_SHARE = 1 / 3
"""A method with a larger share of broken answers is flagged: its scores say little of use."""


def net_rate(
    outcomes: Floats,
    bootstrap: PairedBootstrap,
    rows: NDArray[Any] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> PreferenceRate:
    """The net rate of outcomes (N, P) of −1, 0 and +1, averaged over a prompt's pairs first.

    With one pair a prompt this is `preference_rate`.
    """
    kept = outcomes if rows is None else outcomes[rows]
    if kept.shape[1] == 1:
        return preference_rate(kept[:, 0], seed=seed, resamples=resamples)
    net = kept.mean(1)
    won, lost = int((net > 0).sum()), int((net < 0).sum())
    found = bootstrap.mean(outcomes.mean(1), rows)
    return PreferenceRate(
        rate=100 * found.value,
        low=100 * found.low,
        high=100 * found.high,
        n=len(kept),
        wins=float((kept > 0).mean(1).sum()),
        losses=float((kept < 0).mean(1).sum()),
        ties=float((kept == 0).mean(1).sum()),
        won=won,
        lost=lost,
        p_value=sign_test(won, lost),
    )


def weighted_reward(
    reward: Floats, cost: Floats, weights: Mapping[Any, float], scales: Mapping[Any, float]
) -> Floats:
    """Σ weight · score / scale, of any shape."""
    return weights["reward"] * reward / scales["reward"] + weights["cost"] * cost / scales["cost"]


def quadrants(helpful: Floats, cost_a: Floats, safe_below: float) -> dict[str, float]:
    """Shares of A's answers that are safe or not, and better or worse than B's by reward.

    ``helpful``: `outcomes` by reward. Safe: cost at most ``safe_below``. Keys ``safe_better``,
    ``safe_equal``, ``safe_worse`` and the same with ``unsafe``; they sum to 1. Over all pairs of
    answers to a prompt, prompts alike.
    """
    safe = np.repeat(cost_a <= safe_below, helpful.shape[1] // cost_a.shape[1], axis=1)
    names = {1.0: "better", 0.0: "equal", -1.0: "worse"}
    return {
        f"{safety}_{name}": float(((safe == is_safe) & (helpful == sign)).mean())
        for safety, is_safe in (("safe", True), ("unsafe", False))
        for sign, name in names.items()
    }


def best_of_groups(weighted: Floats, n: int) -> NDArray[np.int64]:
    """Which of R answers (N, R) are best of each of R // n groups in a row; (N, R // n)."""
    groups = weighted.shape[1] // n
    grouped = weighted[:, : groups * n].reshape(len(weighted), groups, n)
    return grouped.argmax(2) + n * np.arange(groups)


def best_of_kl(n: int) -> float:
    """Upper bound in nats of the KL of best-of-n answers to single ones: log n − (n − 1)/n."""
    return math.log(n) - (n - 1) / n


def text_figures(texts: Sequence[str]) -> dict[str, float]:
    """Shares, means and diversity of answers."""
    return {
        "refusal_share": float(np.mean([is_refusal(text) for text in texts])),
        "empty_share": float(np.mean([is_empty(text) for text in texts])),
        "median_words": median_length(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "repetitive_share": float(np.mean([is_degenerate(text) for text in texts])),
        "repetition": float(np.mean([repetition(text) for text in texts])),
    }


def decoding_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """What decoding took and where it accepted; a figure the answers do not know is left out."""
    figures: dict[str, Any] = {}
    tokens = sum(a.tokens or 0 for a in answers)
    if not tokens or any(a.tokens is None for a in answers):
        return figures
    figures["tokens"] = tokens
    figures["mean_tokens"] = tokens / len(answers)
    figures["cut_share"] = float(np.mean([a.finish_reason == "length" for a in answers]))
    figures |= kl_figures(answers)
    if all(a.examined is not None for a in answers):
        figures["examined_per_token"] = sum(a.examined or 0 for a in answers) / tokens
    if all(a.positions is not None for a in answers):
        figures["accept_positions"] = accept_positions([a.positions or () for a in answers])
    figures |= cost_figures(answers, tokens)
    return figures


def kl_figures(answers: Sequence[Answer]) -> dict[str, float]:
    """KL in nats a token and an answer, of answers that know it."""
    tokens = sum(a.tokens or 0 for a in answers)
    if not tokens or any(a.kl is None for a in answers):
        return {}
    kl = sum(a.kl or 0.0 for a in answers)
    return {"kl_per_token": kl / tokens, "kl_per_answer": kl / len(answers)}


def cost_figures(answers: Sequence[Answer], tokens: int) -> dict[str, float]:
    """LLM forwards a token of the answers kept and tokens a second, from all ``answers`` made."""
    if not tokens or any(a.forwards is None or a.seconds is None for a in answers):
        return {}
    seconds = sum(a.seconds or 0.0 for a in answers)
    figures = {"forwards_per_token": sum(a.forwards or 0.0 for a in answers) / tokens}
    return figures | ({"tokens_per_s": tokens / seconds} if seconds else {})


def accept_positions(histograms: Sequence[Sequence[int]]) -> list[float]:
    """Share of tokens that were their position's first, second, … candidate."""
    width = max([len(histogram) for histogram in histograms], default=0)
    total = np.zeros(width)
    for histogram in histograms:
        total[: len(histogram)] += histogram
    return (total / max(1.0, total.sum())).tolist()


def broken(text: str, kind: str) -> bool:
    """Whether an answer is empty, repetitive, or refuses an ordinary question."""
    return is_empty(text) or is_degenerate(text) or (kind == "ordinary" and is_refusal(text))


def flag(texts: Sequence[str], kinds: Sequence[str]) -> str | None:
    """What is wrong with a method more than a third of whose answers are broken; else None.

    Judged over all answers and over those to ordinary questions alone; ``kinds`` as ``texts``.
    """
    for who, chosen in (("answers", None), ("answers to ordinary questions", "ordinary")):
        some = [(t, k) for t, k in zip(texts, kinds, strict=True) if chosen in (None, k)]
        if not some or np.mean([broken(*pair) for pair in some]) <= BROKEN_SHARE:
            continue
        share = {
            "empty": np.mean([is_empty(t) for t, _ in some]),
            "repetitive": np.mean([is_degenerate(t) for t, _ in some]),
            "refusals of ordinary questions": np.mean(
                [k == "ordinary" and is_refusal(t) for t, k in some]
            ),
        }
        parts = ", ".join(f"{value:.0%} {name}" for name, value in share.items() if value)
        total = np.mean([broken(*pair) for pair in some])
        return f"{total:.0%} of its {len(some)} {who} are broken ({parts}): do not trust its scores"
    return None


def mean_difference(
    a: Floats, b: Floats, bootstrap: PairedBootstrap, rows: NDArray[Any] | None = None
) -> dict[str, float]:
    """Mean over prompts of A's mean score (N, R) less B's (N, Q), with its interval."""
    return bootstrap.mean(a.mean(1) - b.mean(1), rows).plain()
