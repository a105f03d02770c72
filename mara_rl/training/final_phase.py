"""Last phase: the agent against the base LLM on held-out prompts, then the registry."""

import numpy as np

from mara_rl.agent import Agent
from mara_rl.evaluation.heldout import HeldoutResult, compare_heldout, report, save_heldout
from mara_rl.score_models.loading import load_score_model
from mara_rl.tracking.registry import AgentRegistry, PromotionEvidence, model_name_for
from mara_rl.tracking.run import TrackingRun
from mara_rl.training.base_phase import score_in_batches
from mara_rl.training.config import EvaluationConfig, TrainConfig
from mara_rl.training.display import Display
from mara_rl.training.rollout_group import RolloutGroup, derived_seed
from mara_rl.training.run_folder import RunFolder
from mara_rl.training.session import Session
from services.prompt_files import PromptRecord
from services.score_client import ScoreClient


def evaluate(
    config: TrainConfig,
    evaluation: EvaluationConfig,
    folder: RunFolder,
    session: Session,
    runners: RolloutGroup,
    agent: Agent,
    prompts: list[PromptRecord],
    score_scales: dict[str, float],
    display: Display,
) -> HeldoutResult:
    """Answer, judge, report and save; scores come from the services, judges run in process."""
    prompts = prompts[: evaluation.max_prompts]
    texts = [prompt.text for prompt in prompts]
    kl_texts = texts[:: max(1, len(texts) // max(1, evaluation.kl_prompts))][
        : evaluation.kl_prompts
    ]
    kinds = [str(prompt.extra.get("kind", "unlabelled")) for prompt in prompts]
    with display.phase("held-out answers", total=2 * len(texts) + len(kl_texts)) as phase:
        base = runners.answers(texts, rule="greedy", progress=phase.advance)
        aligned = runners.answers(texts, agent=agent, progress=phase.advance)
        kl_answers = runners.answers(
            kl_texts,
            agent=agent,
            rule="sample",
            seed=derived_seed(config.seed, 2),
            progress=phase.advance,
        )
    with display.phase("judging", total=1):
        scorer = ScoreClient(session.scores)
        ours, theirs = (score_in_batches(scorer, answers) for answers in (aligned, base))
        scores = {name: (ours[:, i], theirs[:, i]) for i, name in enumerate(scorer.names)}
        judged = {}
        for axis, name in evaluation.judges.items():
            judge = load_score_model(name)
            first, second = (
                np.asarray(judge.score([(a.prompt, a.text) for a in answers]))
                for answers in (aligned, base)
            )
            judged[axis] = (first, second)
        result = compare_heldout(
            kinds,
            base,
            aligned,
            scores,
            judged,
            score_scales,
            kl_answers,
            seed=config.seed,
        )
    folder.evaluation.mkdir(exist_ok=True)
    ids = [prompt.prompt_id for prompt in prompts]
    save_heldout(folder.evaluation, result, ids, kinds, base, aligned, scores)
    display.line("")
    display.line(report(result, base, aligned))
    display.line("")
    return result


def register(
    config: TrainConfig,
    folder: RunFolder,
    session: Session,
    tracking: TrackingRun,
    heldout: HeldoutResult | None,
    display: Display,
) -> str:
    """Register the agent as `candidate` and try for `champion`; its ``models:/`` URI."""
    with display.phase("registering the agent", total=1):
        model_uri = tracking.log_agent(folder.agent)
        registry = AgentRegistry(session.tracking_uri)
        name = config.registry.model_name or model_name_for(config.llm.name)
        tags = {"run": folder.name, "run_id": tracking.run_id, "seed": str(config.seed)}
        version = registry.register(name, model_uri, tags)
    display.line(f"registered models:/{name}@candidate (version {version})")
    if config.registry.promote and heldout is not None:
        evidence = PromotionEvidence.from_rate(heldout.both, against="base")
        display.line(registry.promote(name, version, evidence=evidence).line)
    return f"models:/{name}/{version}"
