"""Base against aligned greedy answers to held-out prompts: the figures a run ends with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.evaluation.comparison import JudgedAnswers, examples, summary, unscored
from mara_rl.metrics.preference import PreferenceRate, result_line
from mara_rl.metrics.text_quality import is_degenerate


@dataclass(frozen=True)
class HeldoutResult:
    """The figures by kind of prompt, and the rates they rest on.

    Attributes:
        left_out: index of each prompt that is not in them, with the axis of the missing score.
    """

    figures: dict[str, Any]
    both: PreferenceRate
    example_rows: dict[str, int]
    left_out: dict[int, str]

    def metrics(self) -> dict[str, float]:
        """The figures as flat metrics, e.g. ``eval/all/both/rate``."""
        flat: dict[str, float] = {}
        for kind, part in self.figures.items():
            if not isinstance(part, dict):
                flat[f"eval/{kind}"] = part
                continue
            for group in ("rates", "judge_rates"):
                prefix = "judge_" if group == "judge_rates" else ""
                for name, rate in part.get(group, {}).items():
                    for bound in ("rate", "low", "high"):
                        flat[f"eval/{kind}/{prefix}{name}/{bound}"] = float(rate[bound])
            for system in ("aligned", "base"):
                for name, value in part[system].items():
                    flat[f"eval/{kind}/{system}/{name}"] = float(value)
        return flat


def compare_heldout(
    kinds: Sequence[str],
    base: Sequence[DecodedAnswer],
    aligned: Sequence[DecodedAnswer],
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    judge_scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    score_scales: Mapping[str, float],
    kl_answers: Sequence[DecodedAnswer],
    *,
    seed: int = 0,
) -> HeldoutResult:
    """Compare answers to the same prompts.

    Args:
        kinds: kind of each prompt (N,).
        base, aligned: answers (N,).
        scores: (aligned, base) scores (N,) by axis; ``judge_scores`` the same by other models.
        score_scales: standard deviation of each score on base answers.
        kl_answers: answers sampled from the agent, whose ``kl`` estimates its KL to the base LLM.

    A prompt one of whose scores is not finite is left out: an answer without a score is no tie.
    Raises DataError when that leaves none.
    """
    left_out = unscored(
        *(
            {axis: pair[system] for axis, pair in judges.items()}
            for judges in (scores, judge_scores)
            for system in (0, 1)
        )
    )
    rows = np.array([row for row in range(len(aligned)) if row not in left_out], dtype=int)
    if not len(rows):
        raise DataError(f"none of the {len(aligned)} held-out prompts has all its scores")
    first, second = _judged(aligned, base, scores)
    systems = first.subset(rows), second.subset(rows)
    judged = None
    if judge_scores:
        first, second = _judged(aligned, base, judge_scores)
        judged = first.subset(rows), second.subset(rows)
    figures: dict[str, Any] = summary(*systems, [kinds[i] for i in rows], judged=judged, seed=seed)
    figures["left_out"] = len(left_out)
    tokens = sum(len(a.token_ids) for a in kl_answers)
    if tokens:
        figures["kl_per_token"] = sum(a.kl for a in kl_answers) / tokens
    figures["candidates_per_token"] = sum(a.examined for a in aligned) / max(
        1, sum(len(a.token_ids) for a in aligned)
    )
    figures["degenerate_share"] = float(np.mean([is_degenerate(a.text) for a in aligned]))
    both = PreferenceRate(**figures["all"]["rates"]["both"])
    shown = {name: int(rows[i]) for name, i in examples(*systems, score_scales).items()}
    return HeldoutResult(figures, both, shown, left_out)


def report(
    result: HeldoutResult, base: Sequence[DecodedAnswer], aligned: Sequence[DecodedAnswer]
) -> str:
    """The figures for a person: the result line first, then tables, then three examples."""
    lines = [result_line(result.both), ""]
    columns = ("rate", "95 % interval", "wins", "losses", "ties", "n")
    lines.append(f"{'net rate of aligned over base':34}" + "".join(f"{c:>17}" for c in columns[:2]))
    for kind, part in result.figures.items():
        if not isinstance(part, dict):
            continue
        for group, title in (("rates", ""), ("judge_rates", ", independent judges")):
            for name, rate in part.get(group, {}).items():
                interval = f"[{rate['low']:+.1f}, {rate['high']:+.1f}]"
                lines.append(f"{f'{kind}: {name}{title}':34}{rate['rate']:>+17.1f}{interval:>17}")
    lines += ["", f"{'answers':34}{'base':>17}{'aligned':>17}"]
    for kind, part in result.figures.items():
        if isinstance(part, dict):
            for name in part["base"]:
                b, a = part["base"][name], part["aligned"][name]
                lines.append(f"{f'{kind}: {name}':34}{b:>17.2f}{a:>17.2f}")
    lines.append("")
    for name in ("kl_per_token", "candidates_per_token", "degenerate_share"):
        if name in result.figures:
            lines.append(f"{name:34}{result.figures[name]:>17.3f}")
    for name, row in result.example_rows.items():
        lines += [
            "",
            f"{name} change  prompt:  {base[row].prompt}",
            f"{'':{len(name)}}         base:    {_one_line(base[row].text)}",
            f"{'':{len(name)}}         aligned: {_one_line(aligned[row].text)}",
        ]
    return "\n".join(lines)


def save_heldout(
    folder: Path,
    result: HeldoutResult,
    prompt_ids: Sequence[str],
    kinds: Sequence[str],
    base: Sequence[DecodedAnswer],
    aligned: Sequence[DecodedAnswer],
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write ``summary.json`` and ``answers.jsonl`` into a folder that exists.

    A score that is not finite is null; prompts that were left out are there as well.
    """
    rows = [
        {
            "id": prompt_id,
            "kind": kind,
            "prompt": base[i].prompt,
            "base": base[i].text,
            "aligned": aligned[i].text,
            "scores": {
                axis: {"base": _finite_or_none(b[i]), "aligned": _finite_or_none(a[i])}
                for axis, (a, b) in scores.items()
            },
        }
        for i, (prompt_id, kind) in enumerate(zip(prompt_ids, kinds, strict=True))
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(result.figures, indent=2), encoding="utf-8")


def _judged(
    aligned: Sequence[DecodedAnswer],
    base: Sequence[DecodedAnswer],
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[JudgedAnswers, JudgedAnswers]:
    first = {axis: pair[0] for axis, pair in scores.items()}
    second = {axis: pair[1] for axis, pair in scores.items()}
    return (
        JudgedAnswers([a.text for a in aligned], first),
        JudgedAnswers([a.text for a in base], second),
    )


def _finite_or_none(score: float) -> float | None:
    return float(score) if np.isfinite(score) else None


def _one_line(text: str) -> str:
    return " ".join(text.split())
