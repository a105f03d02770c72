"""An evaluation from plan to folder: answers, scores, figures, report."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mara_rl import __version__
from mara_rl.agents.agent import Agent
from mara_rl.agents.agent_files import agent_sha256
from mara_rl.common.atomic_write import write_atomically
from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, MaraError
from mara_rl.common.home import mara_home
from mara_rl.evaluation.answer_maker import AnswerMaker
from mara_rl.evaluation.answers import Answer, read_foreign_answers, write_answers
from mara_rl.evaluation.examples import chosen_examples
from mara_rl.evaluation.figures import best_of_groups
from mara_rl.evaluation.generation import Generation, Table
from mara_rl.evaluation.inputs import ANSWERS, FILE, claim, locked, plan_inputs
from mara_rl.evaluation.judged import Judged, baseline_scales
from mara_rl.evaluation.judging import Judging, ScoreSource, score_sources
from mara_rl.evaluation.plan import (
    AXES,
    AgentMethod,
    AnswersMethod,
    BestOfMethod,
    EvaluationPlan,
    PlainMethod,
    RewriteMethod,
)
from mara_rl.evaluation.prompt_set import PromptSet
from mara_rl.evaluation.published import published_beside, published_set
from mara_rl.evaluation.report import write_report
from mara_rl.evaluation.score_cache import ScoreCache
from mara_rl.evaluation.summary import summary
from mara_rl.metrics.preference import PreferenceRate, result_line

SCORES = "scores.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    plan: EvaluationPlan
    folder: Path
    summary: dict[str, Any]

    @property
    def result_line(self) -> str | None:
        """The line scripts read; None without a second method."""
        found = self.summary["result"]
        return result_line(PreferenceRate.of(found)) if found else None


def evaluate(
    plan: EvaluationPlan,
    agents: Mapping[str, Agent],
    prompts: PromptSet,
    maker: AnswerMaker,
    folder: Path,
    display: Display,
    *,
    command: str,
    go_on_hint: str | None = None,
) -> Evaluation:
    """Have the answers of a plan made, score and compare them, or go on where a call ended.

    ``agents`` holds the agent of every method that has one; ``maker`` makes the answers. The folder
    gets ``answers/`` (a jsonl file a method), ``scores.jsonl``, ``summary.json`` and
    ``report.html``. ``command`` is what is said to have made them; ``go_on_hint`` is printed where
    this does not come to its end.

    Raises MaraError with one line; what was made by then stays.
    """
    published_set(plan)  # a wrong name ends this now, not after hours
    with contextlib.ExitStack() as stack:
        if any(judge.asks_ray for judge in plan.judges.values()):
            from services.cluster.ray_session import ray_session

            stack.enter_context(ray_session())
        sources = score_sources(plan)
        given = {
            name: read_foreign_answers(method.file, prompts)
            for name, method in plan.methods.items()
            if isinstance(method, AnswersMethod)
        }
        _check_pools(plan, given)
        inputs = plan_inputs(plan, prompts, agents, maker)  # takes a while: an LLM is read for it
        stack.enter_context(locked(folder))
        if claim(folder, inputs):
            display.line(f"going on in {folder}")
        for name, table in given.items():
            write_answers(folder / ANSWERS / f"{name}.jsonl", table)
        if go_on_hint is not None:
            stack.enter_context(_hint_where_stopped(go_on_hint, display))
        display.line(_about(prompts))
        generation = Generation(plan, prompts, agents, maker, folder / ANSWERS, display)
        tables, kl_answers = generation.run(given)
        cache = stack.enter_context(ScoreCache(mara_home() / "cache" / "scores.sqlite"))
        judging = Judging(plan, prompts, sources, cache, display)
        judged = _judge(plan, prompts, agents, tables, kl_answers, judging, folder)
    with display.phase("figures and report", total=1):
        _write_scores(folder / SCORES, judged)
        judged, left_out = judged.with_all_scores()
        figures = summary(judged)
        figures["prompts"]["left_out"] = left_out
        figures["judges"] = _judges(plan, sources)
        figures["published"] = published_beside(plan, agents, figures)
        if published_set(plan) and not figures["published"]:
            display.line(
                "no figure of the paper is for these LLMs, methods and judges (beaver-7b-v1.0-…)"
            )
        figures["examples"] = (
            {plan.tested: chosen_examples(judged, plan.tested)} if plan.tested else {}
        )
        figures["provenance"] = {
            "command": command,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "mara_rl": __version__,
            "plan": plan.model_dump(mode="json"),
            "inputs": json.loads((folder / FILE).read_text(encoding="utf-8")),
            "agents": {
                name: {**agent.spec.model_dump(), "sha256": agent_sha256(agent)}
                for name, agent in agents.items()
            },
        }
        text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / SUMMARY, text + "\n")
        write_report(folder / REPORT, figures, judged)
    return Evaluation(plan, folder, figures)


@contextlib.contextmanager
def _hint_where_stopped(hint: str, display: Display) -> Iterator[None]:
    try:
        yield
    except (Exception, KeyboardInterrupt):
        display.line(f"stopped: {hint}")
        raise


def _check_pools(plan: EvaluationPlan, given: Mapping[str, Table]) -> None:
    """Refuse to choose among more answers than a file has; of other methods the plan says it."""
    for name, method in plan.methods.items():
        if isinstance(method, BestOfMethod) and method.of in given:
            answers = len(given[method.of][0])
            if answers < method.n:
                raise ConfigError(
                    f"methods.{name}.n: {method.n}, but the file of {method.of!r} has {answers} "
                    "answers to each prompt"
                )


def _about(prompts: PromptSet) -> str:
    parts = [f"evaluation on {len(prompts.prompts)} prompts"]
    if prompts.duplicates:
        parts.append(f"{prompts.duplicates} duplicates dropped")
    if prompts.seen:
        what = "dropped" if prompts.dropped_seen else "kept: see --drop-seen"
        parts.append(f"{len(prompts.seen)} seen in training ({what})")
    return ", ".join(parts)


def _judge(
    plan: EvaluationPlan,
    prompts: PromptSet,
    agents: Mapping[str, Agent],
    tables: dict[str, Table],
    kl_answers: Mapping[str, list[Answer]],
    judging: Judging,
    folder: Path,
) -> Judged:
    """Score all answers; those of best_of methods are chosen among scored ones on the way."""
    scores = {name: judging.scores(name, tables) for name in plan.judges}
    scales = {name: baseline_scales(plan, found) for name, found in scores.items()}
    chosen = {n: m for n, m in plan.methods.items() if isinstance(m, BestOfMethod)}
    rules = {
        name: method.rule or agents[name].spec.rule
        for name, method in plan.methods.items()
        if isinstance(method, AgentMethod)
    }
    judged = Judged(plan, prompts, tables, scores, scales, rules, kl_answers)
    for name, method in chosen.items():
        training = [judged.weighted(judge, method.of) for judge in plan.training_judges]
        weighted = np.sum(training, axis=0)
        best = best_of_groups(weighted, method.n)  # (N, R // n)
        tables[name] = [
            [
                row[int(place)].model_copy(update={"replicate": number})
                for number, place in enumerate(places)
            ]
            for row, places in zip(tables[method.of], best, strict=True)
        ]
        write_answers(folder / ANSWERS / f"{name}.jsonl", tables[name])
    if chosen:
        scores = {name: judging.scores(name, tables) for name in plan.judges}
    return replace(judged, tables={n: tables[n] for n in plan.methods}, scores=scores)


def _judges(
    plan: EvaluationPlan, sources: Mapping[tuple[str, str], ScoreSource]
) -> dict[str, dict[str, Any]]:
    return {
        name: judge.model_dump(mode="json")
        | {f"{axis}_sha256": sources[name, axis].sha256 for axis in AXES}
        for name, judge in plan.judges.items()
    }


def _write_scores(path: Path, judged: Judged) -> None:
    """One line an answer: method, id, replicate, and its scores by judge, null for none."""
    lines = []
    for method, table in judged.tables.items():
        for row, answers in enumerate(table):
            for number, answer in enumerate(answers):
                lines.append(
                    json.dumps(
                        {
                            "method": method,
                            "id": answer.id,
                            "replicate": number,
                            "scores": {
                                judge: {
                                    axis: _finite_or_none(values[row, number])
                                    for axis, values in by_method[method].items()
                                }
                                for judge, by_method in judged.scores.items()
                            },
                        },
                        ensure_ascii=False,
                    )
                )
    write_atomically(path, "".join(line + "\n" for line in lines))


def _finite_or_none(score: float) -> float | None:
    return float(score) if np.isfinite(score) else None


def check_llms(plan: EvaluationPlan, agents: Mapping[str, Agent]) -> None:
    """Refuse LLMs that are not there, and agents that do not fit theirs, before anything is made.

    Raises ConfigError or DataError naming the method.
    """
    from mara_rl.llm.policy_llm import llm_hidden_size

    sizes: dict[str, int] = {}
    for name, method in plan.methods.items():
        if not isinstance(method, PlainMethod | AgentMethod | RewriteMethod):
            continue
        llm = plan.llm_of(method)
        try:
            sizes[llm] = sizes.get(llm) or llm_hidden_size(llm)
            if isinstance(method, AgentMethod):
                agents[name].spec.check_llm(llm, sizes[llm], allow_other_llm=method.allow_other_llm)
        except MaraError as error:
            raise type(error)(f"method {name!r}: {error}") from error
