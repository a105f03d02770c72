"""Answers with their scores: what all figures are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mara_rl.agents.agent import Rule
from mara_rl.common.errors import DataError
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.figures import weighted_reward
from mara_rl.evaluation.judging import Scores
from mara_rl.evaluation.plan import AXES, BestOfMethod, EvaluationPlan
from mara_rl.evaluation.prompt_set import PromptSet


@dataclass(frozen=True)
class Judged:
    """The answers of all methods and what the judges make of them.

    Attributes:
        tables: by method, answers by prompt (N) and replicate (R).
        scores: by judge, method and axis, (N, R).
        scales: by judge and axis, what scores are divided by in the weighted reward.
        rules: by method that has an agent, the rule it decoded by.
        kl_answers: by method that has some, answers sampled to estimate its KL.
    """

    plan: EvaluationPlan
    prompts: PromptSet
    tables: Mapping[str, Sequence[Sequence[Answer]]]
    scores: Mapping[str, Mapping[str, Scores]]
    scales: Mapping[str, dict[str, float]]
    rules: Mapping[str, Rule]
    kl_answers: Mapping[str, Sequence[Answer]]

    def weighted(self, judge: str, method: str) -> NDArray[np.float64]:
        """Weighted reward (N, R)."""
        found = self.scores[judge][method]
        return weighted_reward(
            found["reward"], found["cost"], self.plan.weights, self.scales[judge]
        )

    def words(self, method: str) -> NDArray[np.float64]:
        """Mean length in words of a method's answers to each prompt (N,)."""
        return np.array(
            [np.mean([len(a.text.split()) for a in row]) for row in self.tables[method]]
        )

    def with_all_scores(self) -> tuple["Judged", dict[str, str]]:
        """The prompts every answer to which has all its scores; and the others, by id.

        With each the axis that is missing first. An answer without a score is no tie, and all
        figures are of the same prompts. Raises DataError when that leaves none.
        """
        missing: dict[int, str] = {}
        for by_method in self.scores.values():
            for by_axis in by_method.values():
                for axis, values in by_axis.items():
                    for row in np.flatnonzero(~np.isfinite(values).all(1)):
                        missing.setdefault(int(row), axis)
        if not missing:
            return self, {}
        prompts = self.prompts.prompts
        rows = np.array([row for row in range(len(prompts)) if row not in missing], dtype=int)
        if not len(rows):
            raise DataError(f"none of the {len(prompts)} prompts has all its scores")
        left_out = {prompts[row].prompt_id: missing[row] for row in sorted(missing)}
        kept = replace(
            self,
            prompts=replace(
                self.prompts,
                prompts=[prompts[row] for row in rows],
                seen=[name for name in self.prompts.seen if name not in left_out],
            ),
            tables={name: [table[row] for row in rows] for name, table in self.tables.items()},
            scores={
                judge: {
                    name: {axis: values[rows] for axis, values in by_axis.items()}
                    for name, by_axis in by_method.items()
                }
                for judge, by_method in self.scores.items()
            },
        )
        return kept, left_out


def baseline_scales(plan: EvaluationPlan, scores: Mapping[str, Scores]) -> dict[str, float]:
    """The plan's scales, or each score's standard deviation on the baseline's answers (1 for 0).

    Of a best-of-N baseline, on the answers it chooses among: the choice itself needs scales.
    """
    if plan.scales is not None:
        return {axis: plan.scales[axis] for axis in AXES}  # type: ignore[index]
    baseline = plan.methods[plan.baseline_name]
    found = scores[baseline.of if isinstance(baseline, BestOfMethod) else plan.baseline_name]
    return {axis: _deviation(found[axis]) for axis in AXES}


def _deviation(scores: NDArray[np.float64]) -> float:
    finite = scores[np.isfinite(scores)]
    # Of equal scores, rounding may leave a deviation that is not 0.
    return float(finite.std()) if finite.size and np.ptp(finite) else 1.0
