"""The paper's figures beside the measured ones."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mara_rl.agents.agent import Agent
from mara_rl.common.errors import ConfigError
from mara_rl.evaluation.plan import AXES, AgentMethod, EvaluationPlan, Judge, PlainMethod


def published_set(plan: EvaluationPlan) -> str | None:
    """The paper's prompt set that the plan names, or for ``auto`` its prompt file's name does.

    Raises ConfigError for an unknown one.
    """
    known = _facts()["sets"]
    if plan.published == "auto":
        name = re.sub(r"\W|_", "", Path(plan.prompts).name.lower())
        return next((each for each in known if each.lower() in name), None)
    if plan.published is not None and plan.published not in known:
        raise ConfigError(f"published: {plan.published!r}; expected one of {', '.join(known)}")
    return plan.published


def published_beside(
    plan: EvaluationPlan, agents: Mapping[str, Agent], figures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row for every comparison of the plan that the paper has a figure of.

    An agent as trained against its LLM alone and greedy (the one it was trained on: table 1;
    another: table 3), and on the one it was trained on against methods named ``rlhf``, ``dpo`` and
    ``aligner`` (table 2), by the first judge that has the paper's two score models. ``figures`` is
    what `summary` gave. Nothing where the paper has no figure for the LLM.
    """
    facts, prompt_set = _facts(), published_set(plan)
    judge = next((n for n, j in plan.judges.items() if _judges_as_published(j, facts)), None)
    if prompt_set is None or judge is None:
        return []
    column = facts["sets"].index(prompt_set)
    rows = []
    for name, method in plan.methods.items():
        if not isinstance(method, AgentMethod) or not method.as_trained:
            continue
        llm, own = (_slug(text) for text in (plan.llm_of(method), agents[name].spec.llm))
        transferred = bool(own) and own != llm
        unsaid = "" if own else ", if it was trained on this LLM, which it does not say"
        for other in figures["pairwise"][judge][name]:
            if other in ("rlhf", "dpo", "aligner"):
                table, where = ({} if transferred else facts[other]), f"table 2{unsaid}"
            elif _is_alone(plan, other, plan.llm_of(method)):
                table = facts["transfer"].get(own, {}) if transferred else facts["base"]
                where = "table 3" if transferred else f"table 1{unsaid}"
            else:
                continue
            if llm in table:
                rows.append(
                    {
                        "method": name,
                        "against": other,
                        "prompt_set": prompt_set,
                        "published": table[llm][column],
                        "measured": figures["pairwise"][judge][name][other],
                        "source": f"{facts['source']}, {where}",
                    }
                )
    return rows


def _judges_as_published(judge: Judge, facts: Mapping[str, Any]) -> bool:
    return {axis: _slug(judge.model(axis)) for axis in AXES} == facts["judge"]


def _is_alone(plan: EvaluationPlan, name: str, llm: str) -> bool:
    """Whether a method is this LLM without an agent, greedy."""
    method = plan.methods[name]
    return isinstance(method, PlainMethod) and not method.samples and plan.llm_of(method) == llm


def _facts() -> dict[str, Any]:
    return yaml.safe_load((resources.files(__package__) / "published.yaml").read_text("utf-8"))


def _slug(llm: str) -> str:
    """``meta-llama/Meta-Llama-3-8B-Instruct`` as ``llama-3-8b-instruct``."""
    return llm.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
