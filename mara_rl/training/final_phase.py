"""Last phase: the agent against the base LLM on held-out prompts, then the registry."""

from collections.abc import Mapping, Sequence

from mara_rl.agents.agent_files import agent_sha256, load_agent
from mara_rl.common.errors import MaraError
from mara_rl.evaluation.answer_maker import AnswerMaker
from mara_rl.evaluation.console import show
from mara_rl.evaluation.evaluation import REPORT, Evaluation, evaluate
from mara_rl.evaluation.plan import AXES, EvaluationPlan, checked_plan
from mara_rl.evaluation.prompt_set import prompt_set
from mara_rl.evaluation.tracking import evidence, metrics, version_tags
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.tracking.registry import AgentRegistry, model_name_for, source_tags
from mara_rl.training.config import EvaluationConfig, TrainConfig
from mara_rl.training.run.checkpoint import TrainState
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.run_folder import remove_folder

_AGENT, _CHAMPION = "agent", "champion"  # methods of the comparison


def compare(
    run: RunContext, state: TrainState, prompts: Sequence[PromptRecord], maker: AnswerMaker
) -> Evaluation | None:
    """Evaluate the agent in the run's folder against the base LLM, show, keep and log it.

    The reigning champion is compared on the same prompts. None where the config asks for no
    evaluation, and where none can be had, which is said on a line.
    """
    config, folder, display = run.config, run.folder, run.display
    if config.evaluation is None:
        return None
    if folder.evaluation.exists():  # of a resumed run; its agent may be another one by now
        remove_folder(folder.evaluation)
    agent = load_agent(folder.agent)
    agents = {_AGENT: agent}
    try:
        registry = AgentRegistry(run.session.tracking_uri)
        champion = None
        if config.registry.promote:
            champion = _rival(config, registry, run.tracking.run_id, agent_sha256(agent))
        if champion is not None:
            agents[_CHAMPION] = registry.resolve(champion)
        plan = _plan(run, config.evaluation, state.score_scales, champion)
        done = evaluate(
            plan,
            agents,
            prompt_set(plan, prompts),
            maker,
            folder.evaluation,
            display,
            command=f"mara-rl train {folder.config}",
        )
    except MaraError as error:
        display.line(f"no comparison with the base LLM: {error}")
        return None
    display.line(f"report: {folder.evaluation / REPORT}")
    show(done.summary, display)
    run.tracking.log_metrics({"eval": metrics(done.summary)}, step=state.iteration)
    run.tracking.log_artifacts(folder.evaluation, "evaluation")
    return done


def register(run: RunContext, comparison: Evaluation | None) -> str:
    """Register the agent as `candidate` and try for `champion`; its ``models:/`` URI.

    The gate is the comparison with the base LLM where there is no champion yet, else that with the
    champion. What a run registered before it was cut off is not registered again.
    """
    registry = AgentRegistry(run.session.tracking_uri)
    name = _model_name(run.config)
    sha256 = agent_sha256(load_agent(run.folder.agent))
    version = registry.registered(name, run_id=run.tracking.run_id, sha256=sha256)
    tags = source_tags(
        llm=run.config.llm.name, seed=run.config.seed, run_id=run.tracking.run_id, sha256=sha256
    )
    found = evidence(comparison, _AGENT, name, registry) if comparison else None
    if comparison and found:
        tags |= version_tags(comparison, _AGENT, run.tracking.run_id) | found.tags()
    if version is not None:
        run.display.line(f"registered before: models:/{name}/{version}")
    else:
        with run.display.phase("registering the agent", total=1):
            version = registry.register(
                name, run.tracking.log_agent(run.folder.agent), {**tags, "run": run.folder.name}
            )
        run.display.line(f"registered models:/{name}@candidate (version {version})")
    if run.config.registry.promote and found is not None:
        run.display.line(registry.promote(name, version, evidence=found).line)
    return f"models:/{name}/{version}"


def _plan(
    run: RunContext,
    evaluation: EvaluationConfig,
    scales: Mapping[str, float],
    champion: str | None,
) -> EvaluationPlan:
    """The comparison as a plan. Raises ConfigError where it cannot work."""
    config = run.config
    agent = {"kind": "agent", "agent": str(run.folder.agent), "kl_prompts": evaluation.kl_prompts}
    methods = {"base": {"kind": "base"}, _AGENT: agent}
    if champion is not None:
        methods[_CHAMPION] = {"kind": "agent", "agent": champion}
    services = {axis: run.session.scores.sources[axis] for axis in AXES}
    limits = config.scoring.model_dump(include={"deadline_s", "max_attempts"})
    judges = {"training": {**services, **limits, "serve": True, "training": True}}
    if evaluation.judges:
        judges["independent"] = dict(evaluation.judges)
    return checked_plan(
        {
            "llm": config.llm.name,
            "dtype": config.llm.dtype,
            "system": config.llm.system,
            "prompts": config.prompts.heldout,
            "max_prompts": evaluation.max_prompts,
            "training_prompts": config.prompts.train,
            "max_new_tokens": config.rollouts.max_new_tokens,
            "seed": config.seed,
            "num_slots": config.rollouts.num_slots,
            "methods": methods,
            "judges": judges,
            "weights": {axis: config.scores[axis].weight for axis in AXES},
            "scales": {axis: scales[axis] for axis in AXES},
            "leave_out_unscored": True,
        },
        "evaluation",
    )


def _rival(config: TrainConfig, registry: AgentRegistry, run_id: str, sha256: str) -> str | None:
    """The reigning champion's URI; None where there is none, and where it is the run's own."""
    name = _model_name(config)
    champion = registry.champion(name)
    if champion in (None, registry.registered(name, run_id=run_id, sha256=sha256)):
        return None
    return f"models:/{name}/{champion}"


def _model_name(config: TrainConfig) -> str:
    return config.registry.model_name or model_name_for(config.llm.name)
