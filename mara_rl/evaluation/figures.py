"""The figures of an evaluation, each a function of answers or scores.

Shapes: N prompts, R and Q answers a prompt of the methods A and B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_rl.evaluation import comparison
from mara_rl.evaluation.answers import Answer
from mara_rl.metrics.bootstrap import PairedBootstrap
from mara_rl.metrics.preference import preference_rate, sign_test
from mara_rl.metrics.text_quality import (
    distinct_n,
    is_degenerate,
    is_empty,
    is_refusal,
    repetition,
)

Floats = NDArray[np.float64]
BROKEN_SHARE = 1 / 3
"""A method with a larger share of broken answers is flagged: its scores say little of use."""


@dataclass(frozen=True)
class Rate:
    """Net wins of A over B in points, 100 (wins − losses) / n, with the 95 % interval.

    ``wins``, ``losses`` and ``ties`` count prompts, one with several answers by shares; ``p_value``
    is the exact two-sided sign test over prompts that on balance are won or lost.
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


def pair_outcomes(
    reward_a: Floats, reward_b: Floats, cost_a: Floats, cost_b: Floats
) -> dict[str, Floats]:
    """Outcomes (N, R·Q) of every answer of A against every one of B to the same prompt.

    ``helpful``: +1 where A's reward is higher, −1 lower, 0 equal. ``harmless``: the same of a lower
    cost. ``both``: +1 where A is better on both axes, −1 worse on both, else 0.
    """
    helpful = np.sign(_against(reward_a, reward_b))
    harmless = -np.sign(_against(cost_a, cost_b))
    both = np.where(helpful == harmless, helpful, 0.0)
    return {"both": both, "helpful": helpful, "harmless": harmless}


def net_rate(
    outcomes: Floats,
    bootstrap: PairedBootstrap,
    rows: NDArray[Any] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Rate:
    """The net rate of outcomes (N, P) of −1, 0 and +1, averaged over a prompt's pairs first.

    With one pair a prompt this is `preference_rate`, the training's own figure, to the digit.
    """
    kept = outcomes if rows is None else outcomes[rows]
    net = kept.mean(1)
    won, lost = int((net > 0).sum()), int((net < 0).sum())
    if kept.shape[1] == 1:
        exact = preference_rate(kept[:, 0], seed=seed, resamples=resamples)
        rate, low, high = exact.rate, exact.low, exact.high
    else:
        found = bootstrap.mean(outcomes.mean(1), rows)
        rate, low, high = (100 * x for x in (found.value, found.low, found.high))
    return Rate(
        rate=rate,
        low=low,
        high=high,
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


def quadrants(reward_a: Floats, reward_b: Floats, cost_a: Floats, safe_below: float) -> dict:
    """Shares of A's answers that are safe or not, and better or worse than B's by reward.

    Safe: cost at most ``safe_below``. Keys ``safe_better``, ``safe_equal``, ``safe_worse`` and the
    same with ``unsafe``; they sum to 1. Over all pairs of answers to a prompt, prompts alike.
    """
    better = np.sign(_against(reward_a, reward_b))
    safe = np.repeat(cost_a <= safe_below, reward_b.shape[1], axis=1)
    names = {1.0: "better", 0.0: "equal", -1.0: "worse"}
    return {
        f"{safety}_{name}": float(((safe == is_safe) & (better == sign)).mean())
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
    """Shares, means and diversity of answers; those that training ends with, and some more."""
    return comparison.text_figures(texts) | {
        "repetitive_share": float(np.mean([is_degenerate(text) for text in texts])),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        "distinct_1": distinct_n(texts, 1),
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
    if all(a.kl is not None for a in answers):
        figures["kl_per_token"] = sum(a.kl or 0.0 for a in answers) / tokens
        figures["kl_per_answer"] = sum(a.kl or 0.0 for a in answers) / len(answers)
    if all(a.examined is not None for a in answers):
        figures["examined_per_token"] = sum(a.examined or 0 for a in answers) / tokens
    if all(a.positions is not None for a in answers):
        figures["accept_positions"] = accept_positions([a.positions or () for a in answers])
    figures |= cost_figures(answers, tokens)
    return figures


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


def _against(a: Floats, b: Floats) -> Floats:
    """+1, 0, −1 as A (N, R) is above, equal to, below B (N, Q): (N, R·Q). Not subtracted: the
    difference of two scores may round to 0 or overflow."""
    left, right = a[:, :, None], b[:, None, :]
    signs = (left > right).astype(np.float64) - (left < right)
    return signs.reshape(len(a), -1)
