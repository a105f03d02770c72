"""The paper's figures beside the measured ones."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mara_rl.agent import Agent
from mara_rl.errors import ConfigError
from mara_rl.evaluation.plan import AgentMethod, EvaluationPlan


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

    An agent against the LLM alone (its own: table 1; another: table 3), and against methods named
    ``rlhf``, ``dpo`` and ``aligner`` (table 2). ``figures`` is what `summary` gave. Nothing where
    the paper has no figure for the LLM.
    """
    facts, prompt_set = _facts(), published_set(plan)
    if prompt_set is None:
        return []
    column, judge = facts["sets"].index(prompt_set), next(iter(plan.judges))
    rows = []
    for name, method in plan.methods.items():
        if not isinstance(method, AgentMethod):
            continue
        llm, own = (_slug(text) for text in (plan.llm_of(method), agents[name].spec.llm))
        for other in figures["pairwise"][judge][name]:
            if other == plan.baseline_name:
                transferred = bool(own) and own != llm
                table = facts["transfer"].get(own, {}) if transferred else facts["base"]
                unsaid = "" if own else ", if it was trained on this LLM, which it does not say"
                where = "table 3" if transferred else f"table 1{unsaid}"
            elif other in ("rlhf", "dpo", "aligner"):
                table, where = facts[other], "table 2"
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


def _facts() -> dict[str, Any]:
    return yaml.safe_load((resources.files(__package__) / "published.yaml").read_text("utf-8"))


def _slug(llm: str) -> str:
    """``meta-llama/Meta-Llama-3-8B-Instruct`` as ``llama-3-8b-instruct``."""
    return llm.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
