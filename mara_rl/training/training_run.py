"""A training run, read from top to bottom: from its prompts to the registered agent.

`train` opens the services and goes on from checkpoint to checkpoint; `_go_on` is one way through:
queue, actors, warm start or resume, PPO, agent saved, comparison, registry.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from envs.reward import RewardSpec
from mara_rl import __version__
from mara_rl.agents.agent_files import save_agent
from mara_rl.common.display import Display
from mara_rl.llm.policy_llm import llm_hidden_size
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.score_models.loading import score_model_folder
from mara_rl.tracking.tracking_run import MetricBatch, TrackingRun
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.lost_part import LostPart, lost_on_ray_errors
from mara_rl.training.faults.patience import patience
from mara_rl.training.faults.stop_request import Interrupted, StopRequest
from mara_rl.training.final_phase import compare, register
from mara_rl.training.ppo_phase import PPOPhase
from mara_rl.training.rllib.rollout_group import derived_seed, seed_everything
from mara_rl.training.rllib.workers import Workers, started_workers
from mara_rl.training.rollout_answers import RolloutAnswers
from mara_rl.training.run.checkpoint import TrainState, load_newest_checkpoint
from mara_rl.training.run.prompt_sets import PromptSets
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.run_folder import RunFolder, RunOutcome, remove_folder
from mara_rl.training.run.run_names import EXPERIMENT
from mara_rl.training.run.run_queue import RunQueue
from mara_rl.training.run.session import training_session
from mara_rl.training.start_phase import run_start_phase
from services.cluster.ray_internals import silence_hints
from services.scoring.score_client import ScoreClient

_MAX_RESTARTS = 3  # without a new checkpoint in between
_RESTART_WAIT_S = 20.0

Checkpoint = tuple[TrainState, dict[str, Any]]
"""A state of the run and of its learners."""


def train(
    config: TrainConfig, folder: RunFolder, display: Display, *, single_node: bool = False
) -> RunOutcome:
    """Run or resume (from the folder's newest whole checkpoint) a training run to its end.

    When the learner or the queue is lost on the way, it goes back to the newest checkpoint itself.
    Raises MaraError with a one-line reason, or `Interrupted` after Ctrl-C or SIGTERM, with a
    checkpoint saved where training had begun.
    """
    prompts = PromptSets.load(config, display)
    if config.evaluation:
        for judge in config.evaluation.judges.values():
            score_model_folder(judge)  # a wrong name ends the run now, not after training
    if config.driver_torch_threads is not None:
        torch.set_num_threads(config.driver_torch_threads)
    silence_hints()
    checkpoint = load_newest_checkpoint(folder.checkpoints)
    unsent = checkpoint[0].unsent_metrics if checkpoint else []
    with _run_context(config, folder, prompts, unsent, display, single_node=single_node) as run:
        outcome = _go_on_until_done(run, checkpoint)
    folder.finish(outcome)  # MLflow has it all by now
    return outcome


@contextlib.contextmanager
def _run_context(
    config: TrainConfig,
    folder: RunFolder,
    prompts: PromptSets,
    unsent_metrics: list[MetricBatch],
    display: Display,
    *,
    single_node: bool,
) -> Iterator[RunContext]:
    """Take note of signals, start the services, and open the MLflow run."""
    spec = config.agent_spec(llm_hidden_size(config.llm.name))
    with StopRequest(display) as stop, contextlib.ExitStack() as stack:
        # A run that is begun has met them before: they may be on their way up, like itself.
        begun = folder.mlflow_run_id is not None
        limit_s = config.ppo.no_progress_timeout_s if begun else 0.0
        patient = patience(limit_s, display, stop.check)
        with display.phase("starting services", total=1):
            session = stack.enter_context(
                training_session(config, folder.name, patient, display, single_node=single_node)
            )
            stop.listen()
            tracking = stack.enter_context(
                patient(
                    TrackingRun.start,
                    session.tracking_uri,
                    EXPERIMENT,
                    folder.name,
                    config.model_dump(mode="json"),
                    run_id=folder.mlflow_run_id,
                    unsent=unsent_metrics,
                )
            )
            folder.mlflow_run_id = tracking.run_id
        yield RunContext(
            config, folder, spec, prompts, session, tracking, display, check_interrupt=stop.check
        )


def _go_on_until_done(run: RunContext, checkpoint: Checkpoint | None) -> RunOutcome:
    """Go on from ``checkpoint``, and from the newest one each time a part is lost."""
    resumes = checkpoint[0].restarts if checkpoint else 0
    restarts, saved = 0, -1
    while True:
        try:
            return _go_on(run, checkpoint)
        except LostPart as error:
            checkpoint = load_newest_checkpoint(run.folder.checkpoints)
            if checkpoint is None:
                raise
            state = checkpoint[0]
            restarts = restarts + 1 if state.iteration == saved else 1
            if restarts > _MAX_RESTARTS:
                raise
            saved = state.iteration
            resumes += 1
            state.restarts = resumes
            run.display.line(f"{error}; going back to checkpoint {saved}")
            time.sleep(_RESTART_WAIT_S * (restarts - 1))
            run.check_interrupt()


def _go_on(run: RunContext, checkpoint: Checkpoint | None) -> RunOutcome:
    """From a checkpoint, or from the start, to the registered agent."""
    state = checkpoint[0] if checkpoint else TrainState()
    queue = RunQueue.filled(run, state.position)
    seed_everything(derived_seed(run.config.seed, 0))
    with (
        lost_on_ray_errors("a part of the run failed"),
        started_workers(run, queue.source) as workers,
    ):
        prompts, too_long = run.prompts.fitting(workers.runners, run.display)
        queue.withdraw(too_long.train, "too long for the LLM's context")
        ppo = PPOPhase(run, workers, queue, state)
        with _saved_on_interrupt(ppo, state):
            if checkpoint:
                _resume(run, workers, checkpoint, ppo)
            else:
                _warm_start(run, workers, prompts, state)
                ppo.save()
            workers.algorithm.reward = _reward(run.config, state)
            ppo.run()
            ppo.save()
        _save_agent(run, workers, state)
        outcome = _compared_and_registered(run, workers, prompts.heldout, state)
        run.tracking.log_metrics(
            {f"time/{name.replace(' ', '_')}_s": s for name, s in run.display.phase_s.items()},
            step=state.iteration,
        )
    if run.config.prompts.queue is None:  # else it is the user's, with prompts of theirs
        queue.expire()
    return outcome


@contextlib.contextmanager
def _saved_on_interrupt(ppo: PPOPhase, state: TrainState) -> Iterator[None]:
    """A checkpoint before `Interrupted` goes on, where training has begun."""
    try:
        yield
    except Interrupted:
        if state.position is not None:
            ppo.save()
        raise


def _resume(run: RunContext, workers: Workers, checkpoint: Checkpoint, ppo: PPOPhase) -> None:
    state, learners = checkpoint
    workers.learners.load_state(learners)
    ppo.barrier()
    run.display.line(f"resumed {run.folder.name} at iteration {state.iteration}")


def _warm_start(run: RunContext, workers: Workers, prompts: PromptSets, state: TrainState) -> None:
    """Score scales and, where asked for, an agent to begin with, into state and learners."""
    start = run_start_phase(
        run.config,
        run.spec,
        [prompt.text for prompt in prompts.train],
        workers.runners,
        ScoreClient(run.session.scores),
        run.display,
        run.check_interrupt,
    )
    state.score_scales = dict(start.reward.scales)
    state.warm_start = start.figures
    state.token_forwards = start.token_forwards
    if start.agent is not None and start.value is not None:
        workers.learners.start_from(start.agent, start.value)
    left_out = {
        "train": len(run.prompts.train) - len(prompts.train),
        "heldout": len(run.prompts.heldout) - len(prompts.heldout),
    }
    run.tracking.log_metrics({"prompts/too_long": left_out, **start.figures}, step=0)


def _reward(config: TrainConfig, state: TrainState) -> RewardSpec:
    weights = {name: score.weight for name, score in config.scores.items()}
    return RewardSpec(weights, state.score_scales)


def _save_agent(run: RunContext, workers: Workers, state: TrainState) -> None:
    """Save the trained agent in the run's folder."""
    if run.folder.agent.exists():  # a resumed run that had come this far before
        remove_folder(run.folder.agent)
    metadata = {
        "mara_rl": __version__,
        "run": run.folder.name,
        "seed": run.config.seed,
        "iterations": state.iteration,
        "score_weights": {name: score.weight for name, score in run.config.scores.items()},
        "score_scales": state.score_scales,
        "system": run.config.llm.system,
    }
    save_agent(workers.learners.agent(), run.folder.agent, metadata=metadata)


def _compared_and_registered(
    run: RunContext, workers: Workers, prompts: list[PromptRecord], state: TrainState
) -> RunOutcome:
    """Compare the saved agent with the base LLM where there is an evaluation, and register it."""
    maker = RolloutAnswers(run.config, workers.runners, run.check_interrupt)
    comparison = compare(run, state, prompts, maker)
    agent_uri = register(run, comparison)
    return RunOutcome(
        run=run.folder.name,
        agent_uri=agent_uri,
        preference_rate=comparison.result_line if comparison else None,
    )
