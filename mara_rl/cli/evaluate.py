"""``mara-rl evaluate``: any set of methods on the same prompts, compared and reported."""

import contextlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mara_rl.cli.options import AgentsLLM, AllowOtherLLM, Overrides, SingleNode
from mara_rl.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mara_rl.agents.agent import Agent
    from mara_rl.evaluation.plan import EvaluationPlan


def evaluate(
    plan: Annotated[
        str | None, typer.Argument(help="A preset (quickstart, paper-protocol) or a YAML plan.")
    ] = None,
    agents: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            metavar="[NAME=]REF",
            help="models:/name@alias, a folder, a .pth or a hub id. Repeatable. Unless given: the "
            "champion for the LLM.",
        ),
    ] = None,
    llm: AgentsLLM = None,
    prompts: Annotated[
        str | None, typer.Option(help="A jsonl, json or parquet file; or packaged, the default.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="base, sampled, agent, agent-sampled, exact, best-of-N, strength-S, with commas; "
            "base,agent unless given. The first is what the others are compared with."
        ),
    ] = None,
    other_llms: Annotated[
        list[str] | None,
        typer.Option("--other-llm", metavar="NAME=LLM", help="Another LLM's greedy answers."),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option("--answers", metavar="NAME=FILE", help="Answers made elsewhere (jsonl)."),
    ] = None,
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="NAME=REWARD,COST[,training]",
            help="Two score models. Repeatable; the first gives the result line. Unless given: the "
            "shipped ones, both those trained on and the independent ones.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; a new one under MARA_HOME unless given.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(help="That many, spread over all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of samples and bootstrap.")] = None,
    drop_seen: Annotated[
        bool, typer.Option("--drop-seen", help="Leave out prompts seen in training.")
    ] = False,
    allow_other_llm: AllowOtherLLM = False,
    overrides: Overrides = None,
    track: Annotated[
        bool, typer.Option("--track", help="Log to MLflow; tag agents that come from its registry.")
    ] = False,
    single_node: SingleNode = False,
) -> None:
    """Compare methods on the same prompts: answers, scores, intervals, report.

    The same command with the same --out goes on where an earlier one ended.
    """
    from rich.console import Console

    from mara_rl.common.display import Display
    from mara_rl.common.yaml_settings import override
    from mara_rl.evaluation.plan import checked_plan, read_plan

    flags = {
        "llm": llm,
        "prompts": prompts,
        "max_prompts": max_prompts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "drop_seen": drop_seen or None,
    }
    # Those of single methods wait for the methods that short names give.
    late = [text for text in overrides or [] if text.startswith("methods.")]
    early = [text for text in overrides or [] if text not in late]
    values: dict[str, Any] = read_plan(plan, early)
    values |= {key: value for key, value in flags.items() if value is not None}
    if judges:
        if any(text.startswith("judges") for text in early):
            raise ConfigError("--set judges…: --judge replaces all judges; expected one of the two")
        values["judges"] = _judges(judges)
    named = _named_agents(agents)
    short = methods.split(",") if methods is not None else None
    values["methods"] = _methods(values, short, named, other_llms, answers)
    override(values, late)
    if allow_other_llm:
        for spec in values["methods"].values():
            if isinstance(spec, dict) and spec.get("kind") == "agent":
                spec["allow_other_llm"] = True
    checked = checked_plan(values, f"plan {plan!r}" if plan else "plan")
    checked = _pinned(checked, single_node)
    loaded = _loaded(checked, single_node)
    own = next((agent.spec.llm for agent in loaded.values() if agent.spec.llm), None)
    if "llm" not in values and own:
        checked = checked.model_copy(update={"llm": own})
    _run(checked, loaded, out, Display(Console()), track=track, single_node=single_node)


def _run(
    plan: "EvaluationPlan",
    agents: Mapping[str, "Agent"],
    out: Path | None,
    display: Any,
    *,
    track: bool,
    single_node: bool,
) -> None:
    from mara_rl.cli.agents import registry_uri
    from mara_rl.evaluation.console import show
    from mara_rl.evaluation.evaluation import check_llms
    from mara_rl.evaluation.evaluation import evaluate as run
    from mara_rl.evaluation.local_answers import LocalAnswers
    from mara_rl.evaluation.prompt_set import load_prompt_set

    check_llms(plan, agents)
    prompts = load_prompt_set(plan)
    uri = registry_uri(single_node) if track else None
    folder = out or _new_folder()
    display.line(f"evaluation in {folder}")
    command = shlex.join(["mara-rl", *sys.argv[1:]])
    try:
        done = run(
            plan,
            agents,
            prompts,
            LocalAnswers(plan, display),
            folder,
            display,
            command=command,
            go_on_hint=f"the same command with --out {folder} goes on from here",
        )
    except (Exception, KeyboardInterrupt):
        if out is None:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise
    try:
        if uri is not None:
            from mara_rl.evaluation.tracking import track as log

            for line in log(done, uri):
                display.line(line)
    finally:  # with MLflow away as well
        display.line(f"report: {folder / 'report.html'}")
        show(done.summary, display)


def _methods(
    values: Mapping[str, Any],
    short: Sequence[str] | None,
    agents: dict[str, str],
    other_llms: Sequence[str] | None,
    answers: Sequence[str] | None,
) -> dict[str, Any]:
    """Those of the plan, then those of the flags; ``base,agent`` where neither names any.

    One that both have is no matter where it is the same.
    """
    from mara_rl.evaluation.method_names import methods_of
    from mara_rl.llm.policy_llm import SMOLLM2
    from mara_rl.tracking.registry import model_name_for

    planned = values.get("methods") or {}
    if not isinstance(planned, dict):
        raise ConfigError(f"methods: {planned!r}; expected a mapping of names")
    if short is None:
        short = ["agent"] if agents and planned else ([] if planned else ["base", "agent"])
        if (other_llms or answers) and not agents and not planned:
            short = ["base"]
    wants_agent = any(name.startswith(("agent", "exact", "strength-")) for name in short)
    if agents and not wants_agent:
        raise ConfigError(f"--agent: no method uses it; --methods is {','.join(short)}")
    if not agents and wants_agent:
        champion = f"models:/{model_name_for(str(values.get('llm') or SMOLLM2))}@champion"
        agents = {"agent": champion}
    found = [*planned.items(), *methods_of(short, agents).items()]
    found += [
        (name, {"kind": "base", "llm": ref}) for name, ref in _pairs("--other-llm", other_llms)
    ]
    found += [
        (name, {"kind": "answers", "file": file}) for name, file in _pairs("--answers", answers)
    ]
    methods: dict[str, Any] = {}
    for name, spec in found:
        if methods.get(name, spec) != spec:
            raise ConfigError(f"methods: two are named {name!r}; expected different names")
        methods[name] = dict(spec) if isinstance(spec, dict) else spec
    return methods


def _named_agents(refs: Sequence[str] | None) -> dict[str, str]:
    agents: dict[str, str] = {}
    for given in refs or []:
        name, ref = _name_and_ref(given) or ("agent", given)
        if name in agents:
            raise ConfigError(
                f"--agent: two are named {name!r}; expected NAME=REF with different names"
            )
        agents[name] = ref
    return agents


def _pairs(option: str, given: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in given or []:
        found = _name_and_ref(text)
        if found is None:
            raise ConfigError(f"{option}: {text!r}; expected NAME=…")
        pairs.append(found)
    return pairs


def _name_and_ref(text: str) -> tuple[str, str] | None:
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", text)
    return (found[1], found[2]) if found else None


def _judges(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    judges: dict[str, dict[str, Any]] = {}
    for name, models in _pairs("--judge", given):
        if name in judges:
            raise ConfigError(f"--judge: two are named {name!r}; expected different names")
        reward, _, rest = models.partition(",")
        cost, _, role = rest.partition(",")
        if not cost or role not in ("", "training"):
            raise ConfigError(f"--judge: {name}={models}; expected NAME=REWARD,COST[,training]")
        judges[name] = {"reward": reward, "cost": cost, "training": role == "training"}
    return judges


def _pinned(plan: "EvaluationPlan", single_node: bool) -> "EvaluationPlan":
    """The plan with the versions that aliases of the registry name now: they may move meanwhile."""
    from mara_rl.cli.agents import registry_uri
    from mara_rl.evaluation.plan import AgentMethod
    from mara_rl.tracking.registry import AgentRegistry, is_version_ref

    methods = dict(plan.methods)
    for name, method in plan.methods.items():
        if isinstance(method, AgentMethod) and is_version_ref(method.agent):
            try:
                version = AgentRegistry(registry_uri(single_node)).find(method.agent)
            except DataError as error:
                raise DataError(f"method {name!r}: {error}") from error
            ref = f"models:/{version.name}/{version.version}"
            methods[name] = method.model_copy(update={"agent": ref})
    return plan.model_copy(update={"methods": methods})


def _loaded(plan: "EvaluationPlan", single_node: bool) -> dict[str, "Agent"]:
    """The agent of every method that has one, each reference resolved once."""
    from mara_rl.agents.agent_refs import fetch_agent
    from mara_rl.cli.agents import registry_uri
    from mara_rl.evaluation.plan import AgentMethod
    from mara_rl.tracking.registry import AgentRegistry, is_registry_ref

    by_ref: dict[str, Agent] = {}
    agents = {}
    for name, method in plan.methods.items():
        if not isinstance(method, AgentMethod):
            continue
        ref = method.agent
        if ref not in by_ref:
            try:
                by_ref[ref] = (
                    AgentRegistry(registry_uri(single_node)).resolve(ref)
                    if is_registry_ref(ref)
                    else fetch_agent(ref)
                )
            except DataError as error:
                raise DataError(f"method {name!r}: {error}") from error
        agents[name] = by_ref[ref]
    return agents


def _new_folder() -> Path:
    from mara_rl.common.home import mara_home

    number = 1
    while True:
        folder = mara_home() / f"evaluation-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
