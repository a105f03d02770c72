"""All figures of an evaluation as one object; docs/evaluation.md is the key to it."""

from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from mara_rl.evaluation.figures import (
    best_of_kl,
    cost_figures,
    decoding_figures,
    flag,
    kl_figures,
    mean_difference,
    net_rate,
    quadrants,
    text_figures,
)
from mara_rl.evaluation.judged import Judged
from mara_rl.evaluation.plan import (
    AXES,
    AgentMethod,
    BestOfMethod,
    PlainMethod,
    RewriteMethod,
)
from mara_rl.metrics.bootstrap import PairedBootstrap
from mara_rl.metrics.preference import Floats, PreferenceRate, outcomes

FORMAT = 1
MIN_GROUP = 2
SAMPLED_KL = "estimate from sampled answers"
TEMPERED_KL = "along answers sampled at another temperature"
GREEDY_KL = "along greedy answers"
BOUND_KL = "upper bound log N − (N − 1)/N"


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

    def outcomes(self, judge: str, a: str, b: str) -> dict[str, Floats]:
        ours, theirs = (self._judged.scores[judge][name] for name in (a, b))
        return outcomes(ours["reward"], theirs["reward"], ours["cost"], theirs["cost"])

    def rate(self, outcomes: Floats, rows: NDArray[Any] | None = None) -> PreferenceRate:
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
            outcomes["helpful"], ours["cost"], judged.plan.judges[judge].safe_below
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
        if tokens and isinstance(source, PlainMethod) and source.is_reference:
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
        if name in judged.kl_answers:
            figures |= kl_figures(judged.kl_answers[name]) | {"kl_is": SAMPLED_KL}
    elif isinstance(method, PlainMethod) and not method.is_reference:
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
