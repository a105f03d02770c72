"""All figures of an evaluation as one object; docs/evaluation.md is the key to it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_rl.agents.agent import Rule
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.figures import (
    Rate,
    best_of_kl,
    cost_figures,
    decoding_figures,
    flag,
    mean_difference,
    net_rate,
    pair_outcomes,
    quadrants,
    text_figures,
    weighted_reward,
)
from mara_rl.evaluation.judging import Scores
from mara_rl.evaluation.plan import (
    AXES,
    AgentMethod,
    BaseMethod,
    BestOfMethod,
    EvaluationPlan,
    RewriteMethod,
)
from mara_rl.evaluation.prompt_set import PromptSet
from mara_rl.metrics.bootstrap import PairedBootstrap

FORMAT = 1
MIN_GROUP = 2
SAMPLED_KL = "estimate from sampled answers"
TEMPERED_KL = "along answers sampled at another temperature"
GREEDY_KL = "along greedy answers"
BOUND_KL = "upper bound log N − (N − 1)/N"


@dataclass(frozen=True)
class Judged:
    """The answers of all methods and what the judges make of them.

    Attributes:
        tables: by method, answers by prompt (N) and replicate (R).
        scores: by judge, method and axis, (N, R).
        scales: by judge and axis, what scores are divided by in the weighted reward.
        rules: by method that has an agent, the rule it decoded by.
    """

    plan: EvaluationPlan
    prompts: PromptSet
    tables: Mapping[str, Sequence[Sequence[Answer]]]
    scores: Mapping[str, Mapping[str, Scores]]
    scales: Mapping[str, dict[str, float]]
    rules: Mapping[str, Rule]

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


def baseline_scales(plan: EvaluationPlan, scores: Mapping[str, Scores]) -> dict[str, float]:
    """The plan's scales, or each score's standard deviation on the baseline's answers (1 for 0).

    Of a best-of-N baseline, on the answers it chooses among: the choice itself needs scales.
    """
    if plan.scales is not None:
        return {axis: plan.scales[axis] for axis in AXES}  # type: ignore[index]
    baseline = plan.methods[plan.baseline_name]
    found = scores[baseline.of if isinstance(baseline, BestOfMethod) else plan.baseline_name]
    # Of equal scores, rounding may leave a deviation that is not 0.
    return {axis: float(found[axis].std()) if np.ptp(found[axis]) else 1.0 for axis in AXES}


def summary(judged: Judged) -> dict[str, Any]:
    """Everything but where it came from."""
    plan = judged.plan
    bootstrap = PairedBootstrap(
        len(judged.prompts.prompts), resamples=plan.resamples, seed=plan.seed
    )
    rating = _Rating(judged, bootstrap)
    methods = {name: _method(judged, rating, name) for name in plan.methods}
    result = None
    judge = next(iter(plan.judges))
    if plan.tested is not None:
        rate = methods[plan.tested]["versus_baseline"][judge]["both"]
        result = {"method": plan.tested, "baseline": plan.baseline_name, "judge": judge, **rate}
    return {
        "format": FORMAT,
        "result": result,
        "baseline": plan.baseline_name,
        "prompts": _prompts(judged),
        "weights": dict(plan.weights),
        "scales": {name: dict(scales) for name, scales in judged.scales.items()},
        "methods": methods,
        "pairwise": {name: _pairwise(judged, rating, name) for name in plan.judges},
        "flags": {name: m["flag"] for name, m in methods.items() if m["flag"]},
    }


class _Rating:
    """Compares two methods under a judge."""

    def __init__(self, judged: Judged, bootstrap: PairedBootstrap) -> None:
        self._judged = judged
        self.bootstrap = bootstrap

    def outcomes(self, judge: str, a: str, b: str) -> dict[str, NDArray[np.float64]]:
        ours, theirs = (self._judged.scores[judge][name] for name in (a, b))
        return pair_outcomes(ours["reward"], theirs["reward"], ours["cost"], theirs["cost"])

    def rate(self, outcomes: NDArray[np.float64], rows: NDArray[Any] | None = None) -> Rate:
        plan = self._judged.plan
        return net_rate(outcomes, self.bootstrap, rows, seed=plan.seed, resamples=plan.resamples)

    def versus(self, judge: str, name: str, other: str) -> dict[str, Any]:
        """All figures of a comparison."""
        judged, bootstrap = self._judged, self.bootstrap
        ours, theirs = judged.scores[judge][name], judged.scores[judge][other]
        outcomes = self.outcomes(judge, name, other)
        weighted = judged.weighted(judge, name), judged.weighted(judge, other)
        longer = judged.words(name) - judged.words(other)
        figures: dict[str, Any] = {key: asdict(self.rate(o)) for key, o in outcomes.items()}
        differences = {"weighted": weighted} | {axis: (ours[axis], theirs[axis]) for axis in AXES}
        figures["difference"] = {
            key: mean_difference(*pair, bootstrap) for key, pair in differences.items()
        }
        figures["length_controlled"] = {
            key: bootstrap.length_controlled(a.mean(1) - b.mean(1), longer).plain()
            for key, (a, b) in differences.items()
        }
        figures["longer_words"] = bootstrap.mean(longer).plain()
        figures["quadrants"] = quadrants(
            ours["reward"], theirs["reward"], ours["cost"], judged.plan.judges[judge].safe_below
        )
        figures["groups"] = {
            group: {
                **{key: asdict(self.rate(o, rows)) for key, o in outcomes.items()},
                "difference": {"weighted": mean_difference(*weighted, bootstrap, rows)},
            }
            for group, rows in judged.prompts.groups(judged.plan.group_by).items()
            if len(rows) >= MIN_GROUP
        }
        return figures


def _prompts(judged: Judged) -> dict[str, Any]:
    prompts = judged.prompts
    return {
        "source": judged.plan.prompts,
        "n": len(prompts.prompts),
        "checksum": prompts.checksum,
        "duplicates_dropped": prompts.duplicates,
        "seen_in_training": list(prompts.seen),
        "seen_were_dropped": prompts.dropped_seen,
        "training_prompts": judged.plan.training_prompts,
        "groups": {name: len(rows) for name, rows in prompts.groups(judged.plan.group_by).items()},
    }


def _method(judged: Judged, rating: _Rating, name: str) -> dict[str, Any]:
    plan, table = judged.plan, judged.tables[name]
    answers = [answer for row in table for answer in row]
    texts = [answer.text for answer in answers]
    replicates = len(table[0])
    kinds = [kind for kind in judged.prompts.kinds() for _ in range(replicates)]
    by_kind = {
        kind: text_figures([t for t, k in zip(texts, kinds, strict=True) if k == kind])
        for kind in sorted(set(kinds) - {""})
    }
    figures: dict[str, Any] = {
        "kind": plan.methods[name].kind,
        "spec": plan.methods[name].model_dump(mode="json"),
        "replicates": replicates,
        "flag": flag(texts, kinds),
        "answers": text_figures(texts) | {"by_kind": by_kind},
        "decoding": _decoding(judged, name),
        "judges": {judge: _levels(judged, rating.bootstrap, judge, name) for judge in plan.judges},
        "versus_baseline": {},
    }
    if name != plan.baseline_name:
        figures["versus_baseline"] = {
            judge: rating.versus(judge, name, plan.baseline_name) for judge in plan.judges
        }
    return figures


def _levels(judged: Judged, bootstrap: PairedBootstrap, judge: str, name: str) -> dict[str, Any]:
    scores = judged.scores[judge][name]
    levels = {axis: scores[axis] for axis in AXES} | {"weighted": judged.weighted(judge, name)}
    safe = scores["cost"] <= judged.plan.judges[judge].safe_below
    return {
        **{key: bootstrap.mean(values.mean(1)).plain() for key, values in levels.items()},
        "safe_share": bootstrap.mean(safe.mean(1)).plain(),
    }


def _decoding(judged: Judged, name: str) -> dict[str, Any]:
    """What the answers took: for answers chosen or rewritten, all that was decoded for them."""
    method, table = judged.plan.methods[name], judged.tables[name]
    answers = [answer for row in table for answer in row]
    figures = decoding_figures(answers)
    tokens = figures.get("tokens", 0)
    if isinstance(method, BestOfMethod):
        used = len(table[0]) * method.n
        pool = [answer for row in judged.tables[method.of] for answer in row[:used]]
        figures |= cost_figures(pool, tokens)
        for of_single in ("kl_per_token", "kl_per_answer", "examined_per_token"):
            figures.pop(of_single, None)
        source = judged.plan.methods[method.of]
        if tokens and isinstance(source, BaseMethod) and source.is_reference:
            figures["kl_per_answer"] = best_of_kl(method.n)
            figures["kl_per_token"] = best_of_kl(method.n) * len(answers) / tokens
            figures["kl_is"] = BOUND_KL
    elif isinstance(method, RewriteMethod):
        rewritten = [answer for row in judged.tables[method.of] for answer in row]
        for of_single in ("kl_per_token", "kl_per_answer", "forwards_per_token", "tokens_per_s"):
            figures.pop(of_single, None)
        figures |= cost_figures([*answers, *rewritten], tokens)
    elif isinstance(method, AgentMethod):
        figures["kl_is"] = GREEDY_KL
        if judged.rules[name] == "sample":
            figures["kl_is"] = SAMPLED_KL if method.temperature == 1.0 else TEMPERED_KL
    elif isinstance(method, BaseMethod) and not method.is_reference:
        for of_single in ("kl_per_token", "kl_per_answer"):  # to the plan's LLM it is not known
            figures.pop(of_single, None)
    return figures


def _pairwise(judged: Judged, rating: _Rating, judge: str) -> dict[str, dict[str, Any]]:
    """Of every two methods the net rate on both axes, and the difference in weighted reward."""
    weighted = {name: judged.weighted(judge, name) for name in judged.plan.methods}
    return {
        a: {
            b: asdict(rating.rate(rating.outcomes(judge, a, b)["both"]))
            | {"weighted": mean_difference(weighted[a], weighted[b], rating.bootstrap)}
            for b in weighted
            if b != a
        }
        for a in weighted
    }
