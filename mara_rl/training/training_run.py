"""A training run from start to registered agent."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from envs.reward import RewardSpec
from mara_rl import __version__
from mara_rl.agents.agent import AgentSpec
from mara_rl.agents.agent_files import save_agent
from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.llm.policy_llm import llm_hidden_size
from mara_rl.prompts.prompt_files import PromptRecord, load_prompts
from mara_rl.score_models.loading import score_model_folder
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.base_phase import BasePhase, run_base_phase
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.lost_part import LostPart, lost_on_ray_errors
from mara_rl.training.faults.patience import patience
from mara_rl.training.faults.stop_request import Interrupted, StopRequest
from mara_rl.training.faults.time_limit import time_limit
from mara_rl.training.final_phase import compare, register
from mara_rl.training.ppo_phase import PPOPhase
from mara_rl.training.rllib.learners import Learners
from mara_rl.training.rllib.ppo import build_algorithm
from mara_rl.training.rllib.rollout_group import RolloutGroup, derived_seed, seed_everything
from mara_rl.training.rollout_answers import RolloutAnswers
from mara_rl.training.run.checkpoint import TrainState, load_newest_checkpoint
from mara_rl.training.run.prompt_sets import fitting_prompts, tell_of_shared_prompts
from mara_rl.training.run.run_folder import RunFolder, RunOutcome, remove_folder
from mara_rl.training.run.run_names import EXPERIMENT, queue_name
from mara_rl.training.run.session import Session, actor_plan, training_session
from services.cluster.ray_session import await_room
from services.cluster.redis_server import redis_errors
from services.prompt_queue.prompt_queue import PromptQueue
from services.prompt_queue.prompt_source import PromptSourceConfig
from services.scoring.score_client import ScoreClient

_MAX_RESTARTS = 3  # without a new checkpoint in between
_RESTART_WAIT_S = 20.0
_QUEUE_KEPT_S = 7 * 24 * 3600  # of a finished run, for `mara-rl status`


def train(
    config: TrainConfig,
    folder: RunFolder,
    display: Display,
    *,
    single_node: bool = False,
) -> RunOutcome:
    """Run or resume (from the folder's newest whole checkpoint) a training run to its end.

    When the learner or the queue is lost on the way, it goes back to the newest checkpoint itself.
    Raises MaraError with a one-line reason, or `Interrupted` after Ctrl-C or SIGTERM, with a
    checkpoint saved where training had begun.
    """
    train_prompts = load_prompts(config.prompts.train, "train")
    heldout_prompts = []
    if config.evaluation:
        heldout_prompts = load_prompts(config.prompts.heldout, "heldout")
        tell_of_shared_prompts(train_prompts, heldout_prompts, display)
        for judge in config.evaluation.judges.values():
            score_model_folder(judge)  # a wrong name ends the run now, not after training
    spec = config.agent_spec(llm_hidden_size(config.llm.name))
    if config.driver_torch_threads is not None:
        torch.set_num_threads(config.driver_torch_threads)
    # Deprecations and hints that no user can act on.
    for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resumed = load_newest_checkpoint(folder.checkpoints)
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
                    unsent=resumed[0].unsent_metrics if resumed else (),
                )
            )
            folder.mlflow_run_id = tracking.run_id
        run = _Run(
            config,
            folder,
            spec,
            train_prompts,
            heldout_prompts,
            session,
            tracking,
            display,
            stop.check,
        )
        resumes = resumed[0].restarts if resumed else 0
        restarts, saved = 0, -1
        while True:
            try:
                outcome = run.go_on(resumed)
                break
            except LostPart as error:
                resumed = load_newest_checkpoint(folder.checkpoints)
                if resumed is None:
                    raise
                state = resumed[0]
                restarts = restarts + 1 if state.iteration == saved else 1
                if restarts > _MAX_RESTARTS:
                    raise
                saved = state.iteration
                resumes += 1
                state.restarts = resumes
                display.line(f"{error}; going back to checkpoint {saved}")
                time.sleep(_RESTART_WAIT_S * (restarts - 1))
                stop.check()
    folder.finish(outcome)  # MLflow has it all by now
    return outcome


@dataclass(frozen=True)
class _Run:
    """What stays the same when a run goes back to a checkpoint."""

    config: TrainConfig
    folder: RunFolder
    spec: AgentSpec
    train_prompts: list[PromptRecord]
    heldout_prompts: list[PromptRecord]
    session: Session
    tracking: TrackingRun
    display: Display
    check_interrupt: Callable[[], None]

    def go_on(self, resumed: tuple[TrainState, dict[str, Any]] | None) -> RunOutcome:
        """From a checkpoint, or from the start, to the registered agent."""
        config, folder, display = self.config, self.folder, self.display
        session, tracking = self.session, self.tracking
        state = resumed[0] if resumed else TrainState()
        queue, prompt_source = self._queue(state)
        seed_everything(derived_seed(config.seed, 0))
        with lost_on_ray_errors("a part of the run failed"), contextlib.ExitStack() as stack:
            await_room(actor_plan(config), config.rollouts.placement_timeout_s)
            limit_s = config.ppo.no_progress_timeout_s
            late = f"rollout actors and learners not ready within {limit_s:g} s"
            with (
                display.phase("loading the LLM", total=1),
                time_limit(limit_s, f"{late} (ppo.no_progress_timeout_s)"),
            ):
                algorithm = build_algorithm(config, self.spec, prompt_source, session.scores)
            stack.callback(algorithm.stop)
            self.check_interrupt()
            learners = Learners(algorithm, self.spec, config, display)
            runners = RolloutGroup(algorithm, config)
            stack.callback(runners.stop)
            train_prompts, too_long = fitting_prompts(self.train_prompts, "train", runners, display)
            with redis_errors(session.prompts.url):
                queue.withdraw([p.prompt_id for p in too_long], "too long for the LLM's context")
            heldout_prompts: list[PromptRecord] = []
            unanswered: list[PromptRecord] = []
            if self.heldout_prompts:
                heldout_prompts, unanswered = fitting_prompts(
                    self.heldout_prompts, "heldout", runners, display
                )
            phase = PPOPhase(
                config,
                folder,
                algorithm,
                learners,
                runners,
                queue,
                session.prompts.url,
                tracking,
                state,
                display,
            )
            try:
                if resumed:
                    learners.load_state(resumed[1])
                    phase.barrier()
                    display.line(f"resumed {folder.name} at iteration {state.iteration}")
                else:
                    base = run_base_phase(
                        config,
                        self.spec,
                        [prompt.text for prompt in train_prompts],
                        runners,
                        ScoreClient(session.scores),
                        display,
                        self.check_interrupt,
                    )
                    _begin(state, base, learners)
                    left_out = {"train": len(too_long), "heldout": len(unanswered)}
                    tracking.log_metrics({"prompts/too_long": left_out, **base.figures}, step=0)
                    phase.save()
                reward = RewardSpec(
                    {name: score.weight for name, score in config.scores.items()},
                    state.score_scales,
                )
                algorithm.reward = reward
                phase.run(self.check_interrupt)
                phase.save()
            except Interrupted:
                if state.position is not None:
                    phase.save()
                raise
            agent = learners.agent()
            if folder.agent.exists():  # a resumed run that had come this far before
                remove_folder(folder.agent)
            save_agent(agent, folder.agent, metadata=_metadata(config, folder, state))
            maker = RolloutAnswers(config, runners, self.check_interrupt)
            comparison = compare(
                config, folder, session, tracking, state, heldout_prompts, maker, display
            )
            agent_uri = register(config, folder, session, tracking, comparison, display)
            tracking.log_metrics(
                {f"time/{name.replace(' ', '_')}_s": s for name, s in display.phase_s.items()},
                step=state.iteration,
            )
        if config.prompts.queue is None:  # else it is the user's, with prompts of theirs
            try:
                with redis_errors(session.prompts.url):
                    queue.expire(_QUEUE_KEPT_S)
            except RetryableError as error:
                display.line(f"the prompt queue stays in Redis: {error}")
        return RunOutcome(
            run=folder.name,
            agent_uri=agent_uri,
            preference_rate=comparison.result_line if comparison else None,
        )

    def _queue(self, state: TrainState) -> tuple[PromptQueue, PromptSourceConfig]:
        """The run's prompt queue, standing where ``state`` says."""
        name = queue_name(self.config, self.folder.name, self.tracking.run_id)
        source = self.session.prompts.model_copy(update={"queue": name})

        def build() -> PromptQueue:
            with redis_errors(source.url):
                queue = source.open_queue(create=True)
                queue.push(self.train_prompts, repeats=self.config.prompts.repeats)
                queue.restart(state.position)
            return queue

        # A Redis that was lost may still be on its way up.
        limit_s = self.config.ppo.no_progress_timeout_s
        return patience(limit_s, self.display, self.check_interrupt)(build), source


def _begin(state: TrainState, base: BasePhase, learners: Learners) -> None:
    state.score_scales = dict(base.reward.scales)
    state.warm_start = base.figures
    state.token_forwards = base.token_forwards
    if base.agent is not None and base.value is not None:
        learners.start_from(base.agent, base.value)


def _metadata(config: TrainConfig, folder: RunFolder, state: TrainState) -> dict[str, Any]:
    return {
        "mara_rl": __version__,
        "run": folder.name,
        "seed": config.seed,
        "iterations": state.iteration,
        "score_weights": {name: score.weight for name, score in config.scores.items()},
        "score_scales": state.score_scales,
        "system": config.llm.system,
    }
