"""An evaluation in MLflow: a run with everything, and tags of the versions it was about."""

from collections.abc import Mapping
from typing import Any

from mara_rl.agents.agent import same_llm
from mara_rl.evaluation.console import points, rate_of
from mara_rl.evaluation.evaluation import Evaluation
from mara_rl.evaluation.plan import AXES, AgentMethod, BaseMethod, EvaluationPlan
from mara_rl.tracking.promotion import PromotionEvidence
from mara_rl.tracking.registry import AgentRegistry, AgentVersion, is_version_ref
from mara_rl.tracking.tracking_run import TrackingRun

EXPERIMENT = "evaluations"


def track(evaluation: Evaluation, uri: str) -> list[str]:
    """Log the folder, the figures and the plan as a run; tag the registered agents in it.

    A version's tags get the figures under every judge and, as what `promote` goes by, its net rate
    under the first one: against the champion where that is among the methods, else against the
    LLM alone where that is the baseline. They replace those of an earlier evaluation. Returns one
    line for each thing done.

    Raises RetryableError when the server is away.
    """
    plan, figures = evaluation.plan, evaluation.summary
    with TrackingRun.start(
        uri, EXPERIMENT, evaluation.folder.name, plan.model_dump(mode="json")
    ) as run:
        run.log_metrics(_metrics(figures), step=0)
        run.log_artifacts(evaluation.folder, "evaluation")
        lines = [f"tracked as MLflow run {run.run_id}"]
        registry = AgentRegistry(uri)
        versions = _versions(plan, figures, registry)
        for method, version in versions.items():
            tags = _tags(figures, method) | {"evaluation.run": run.run_id}
            evidence = _evidence(plan, figures, method, versions, registry)
            tags |= evidence.tags() if evidence else {}
            registry.tag(version.name, version.version, tags, instead_of="evaluation.")
            lines.append(f"tagged {version.name} version {version.version} with {method}'s figures")
    return lines


def _versions(
    plan: EvaluationPlan, figures: Mapping[str, Any], registry: AgentRegistry
) -> dict[str, AgentVersion]:
    """The registered versions by method; of agents as trained, on the LLM they are for."""
    return {
        name: registry.find(method.agent)
        for name, method in plan.methods.items()
        if isinstance(method, AgentMethod)
        and is_version_ref(method.agent)
        and method.as_trained
        and method.llm is None
        and same_llm(figures["provenance"]["agents"][name]["llm"], plan.llm)
    }


def _evidence(
    plan: EvaluationPlan,
    figures: Mapping[str, Any],
    method: str,
    versions: Mapping[str, AgentVersion],
    registry: AgentRegistry,
) -> PromotionEvidence | None:
    """What promotion goes by; None where nothing is said for or against what it went by before."""
    version, judge = versions[method], next(iter(plan.judges))
    flaw = figures["methods"][method]["flag"] or _leak(figures["prompts"])
    champion = registry.champion(version.name)
    for other, its in versions.items():
        if its.name == version.name and its.version == champion and champion != version.version:
            rate = rate_of(figures["pairwise"][judge][method][other])
            return PromotionEvidence.from_rate(
                rate, against="champion", champion_version=champion, flaw=flaw
            )
    baseline = plan.methods[plan.baseline_name]
    alone = isinstance(baseline, BaseMethod) and baseline.llm is None and not baseline.samples
    if alone:
        rate = rate_of(figures["pairwise"][judge][method][plan.baseline_name])
        return PromotionEvidence.from_rate(rate, against="base", flaw=flaw)
    return PromotionEvidence(against="base", flaw=flaw) if flaw else None


def _leak(prompts: Mapping[str, Any]) -> str:
    seen = len(prompts["seen_in_training"])
    if not seen or prompts["seen_were_dropped"]:
        return ""
    return f"{seen} of {prompts['n']} prompts were seen in training (--drop-seen)"


def _tags(figures: Mapping[str, Any], method: str) -> dict[str, str]:
    found = figures["methods"][method]
    tags = {
        "evaluation.prompts": f"{figures['prompts']['source']} ({figures['prompts']['n']}, "
        f"checksum {figures['prompts']['checksum']})",
        "evaluation.flag": found["flag"] or "",
        "evaluation.baseline": figures["baseline"],
    }
    for judge, versus in found["versus_baseline"].items():
        role = "training" if figures["judges"][judge]["training"] else "independent"
        for key in ("both", "helpful", "harmless"):
            tags[f"evaluation.{judge}.{key}"] = f"{points(versus[key])} ({role} judge)"
    if "kl_per_token" in found["decoding"]:
        tags["evaluation.kl_per_token"] = f"{found['decoding']['kl_per_token']:.4f}"
    return tags


def _metrics(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Flat numbers: ``<method>/<judge>/both/rate`` and so on."""
    metrics: dict[str, Any] = {}
    for name, method in figures["methods"].items():
        numbers = {
            key: value
            for part in (method["answers"], method["decoding"])
            for key, value in part.items()
            if isinstance(value, int | float)
        }
        judges: dict[str, Any] = {}
        for judge, levels in method["judges"].items():
            judges[judge] = {axis: levels[axis]["value"] for axis in (*AXES, "weighted")}
            for key, rate in method["versus_baseline"].get(judge, {}).items():
                if key in ("both", "helpful", "harmless"):
                    judges[judge][key] = {b: rate[b] for b in ("rate", "low", "high", "p_value")}
        metrics[name] = numbers | judges
    return metrics
