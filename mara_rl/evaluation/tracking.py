"""An evaluation in MLflow: a run with everything, and tags of the versions it was about."""

from collections.abc import Mapping
from typing import Any

from mara_rl.agents.agent import same_llm
from mara_rl.evaluation.console import points
from mara_rl.evaluation.evaluation import Evaluation
from mara_rl.evaluation.plan import AXES, AgentMethod, PlainMethod
from mara_rl.metrics.preference import PreferenceRate
from mara_rl.tracking.promotion import PromotionEvidence
from mara_rl.tracking.registry import AgentRegistry, AgentVersion, is_version_ref
from mara_rl.tracking.tracking_run import TrackingRun

EXPERIMENT = "evaluations"
_MAX_LEFT_OUT_SHARE = 0.1


def track(evaluation: Evaluation, uri: str) -> list[str]:
    """Log the folder, the figures and the plan as a run; tag the registered agents in it.

    A version's tags get the figures under every judge and, as what `promote` goes by, its
    `evidence`. They replace those of an earlier evaluation. Returns one line for each thing done.

    Raises RetryableError when the server is away.
    """
    plan = evaluation.plan
    with TrackingRun.start(
        uri, EXPERIMENT, evaluation.folder.name, plan.model_dump(mode="json")
    ) as run:
        run.log_metrics(metrics(evaluation.summary), step=0)
        run.log_artifacts(evaluation.folder, "evaluation")
        lines = [f"tracked as MLflow run {run.run_id}"]
        registry = AgentRegistry(uri)
        for method, version in _versions(evaluation, registry).items():
            tags = version_tags(evaluation, method, run.run_id)
            found = evidence(evaluation, method, version.name, registry)
            tags |= found.tags() if found else {}
            registry.tag(version.name, version.version, tags, instead_of="evaluation.")
            lines.append(f"tagged {version.name} version {version.version} with {method}'s figures")
    return lines


def evidence(
    evaluation: Evaluation, method: str, model_name: str, registry: AgentRegistry
) -> PromotionEvidence | None:
    """What promotion of ``method``'s agent goes by: its net rate under the first judge.

    Against the champion of ``model_name`` where that is another method, else against the LLM alone
    where that is the baseline. None where nothing is said for or against what it went by before.
    """
    plan, figures = evaluation.plan, evaluation.summary
    rates = figures["pairwise"][next(iter(plan.judges))][method]
    flaw = figures["methods"][method]["flag"] or _flaw(figures["prompts"])
    champion = registry.champion(model_name)
    versions = _versions(evaluation, registry)
    for other, version in versions.items():
        is_champion = (version.name, version.version) == (model_name, champion)
        if is_champion and other != method and versions.get(method) != version:
            return PromotionEvidence.from_rate(
                PreferenceRate.of(rates[other]),
                against="champion",
                champion_version=champion,
                flaw=flaw,
            )
    baseline = plan.methods[plan.baseline_name]
    alone = isinstance(baseline, PlainMethod) and baseline.llm is None and not baseline.samples
    if alone:
        rate = PreferenceRate.of(rates[plan.baseline_name])
        return PromotionEvidence.from_rate(rate, against="base", flaw=flaw)
    return PromotionEvidence(against="base", flaw=flaw) if flaw else None


def _versions(evaluation: Evaluation, registry: AgentRegistry) -> dict[str, AgentVersion]:
    """The registered versions by method; of agents as trained, on the LLM they are for."""
    agents = evaluation.summary["provenance"]["agents"]
    return {
        name: registry.find(method.agent)
        for name, method in evaluation.plan.methods.items()
        if isinstance(method, AgentMethod)
        and is_version_ref(method.agent)
        and method.as_trained
        and method.llm is None
        and same_llm(agents[name]["llm"], evaluation.plan.llm)
    }


def _flaw(prompts: Mapping[str, Any]) -> str:
    """Why figures on these prompts are not to be trusted; "" where they are."""
    left_out = len(prompts["left_out"])
    total = prompts["n"] + left_out
    if left_out > _MAX_LEFT_OUT_SHARE * total:
        return f"{left_out} of {total} prompts lack a score: do not trust the rate"
    seen = len(prompts["seen_in_training"])
    if not seen or prompts["seen_were_dropped"]:
        return ""
    return f"{seen} of {prompts['n']} prompts were seen in training (--drop-seen)"


def version_tags(evaluation: Evaluation, method: str, run_id: str) -> dict[str, str]:
    """Tags of the version that ``method``'s agent is: its figures, and the MLflow run with all."""
    figures = evaluation.summary
    found = figures["methods"][method]
    tags = {
        "evaluation.run": run_id,
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


def metrics(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a summary: ``<method>/<judge>/both/rate`` and so on, nested."""
    metrics: dict[str, Any] = {"left_out": len(figures["prompts"]["left_out"])}
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
