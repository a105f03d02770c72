"""The PPO phase: iterations, metrics, checkpoints that are barriers."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.faults.runner_errors import RunnerErrors
from mara_rl.training.rllib.learners import Learners
from mara_rl.training.rllib.rollout_group import Faults, RolloutGroup, derived_seed, seed_everything
from mara_rl.training.run.checkpoint import TrainState, save_checkpoint
from mara_rl.training.run.run_folder import RunFolder
from services.cluster.redis_server import redis_errors
from services.prompt_queue.prompt_queue import PromptQueue, QueueLost

_RETRY_WAIT_S = 2.0


class PPOPhase:
    """Runs iterations of an algorithm until the budget is spent or the user interrupts."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        algorithm: Any,
        learners: Learners,
        runners: RolloutGroup,
        queue: PromptQueue,
        redis_url: str,
        tracking: TrackingRun,
        state: TrainState,
        display: Display,
    ) -> None:
        self._config = config
        self._folder = folder
        self._algorithm = algorithm
        self._learners = learners
        self._runners = runners
        self._queue = queue
        self._redis_url = redis_url
        self._tracking = tracking
        self._state = state
        self._display = display
        self._trained_rows = 0.0
        self._attempts = 0  # at an update, in vain
        self._runner_errors = RunnerErrors()
        self._outage = ""
        self._unsure = False  # whether Redis has noted prompts whose batch was dropped
        self._known_causes = ""
        self._runner_restarts = 0
        self._dropped_replies = 0
        self._seen: list[str] = []
        self._duplicates = 0
        self._answers = self._rewards = 0.0  # since the last checkpoint
        # A resumed run starts from the checkpoint of its iteration.
        self._saved_iteration = state.iteration if state.position is not None else -1

    def run(self, check_interrupt: Callable[[], None]) -> None:
        """Train until the configured iterations or minutes.

        Raises RetryableError, after a checkpoint, when nothing is learned for
        ``ppo.no_progress_timeout_s``, and LostPart when going on takes a restart.
        """
        ppo, state = self._config.ppo, self._state
        progress_s = time.monotonic()
        with self._display.phase("PPO", total=ppo.iterations, done=state.iteration) as phase:
            while state.iteration < ppo.iterations and not self._out_of_time():
                started_s = time.monotonic()
                figures = self._iterate()
                queue_figures = self._queue_figures()
                if figures is None:
                    self._learners.check()
                    if time.monotonic() - progress_s > ppo.no_progress_timeout_s:
                        self.save()
                        raise RetryableError(
                            f"no update for {ppo.no_progress_timeout_s:g} s "
                            f"(ppo.no_progress_timeout_s); checkpoint {state.iteration} is saved"
                        )
                    self._attempts += 1
                    self._explain_no_progress()
                    check_interrupt()
                    time.sleep(_RETRY_WAIT_S)
                    continue
                progress_s = time.monotonic()
                self._known_causes = ""
                state.iteration += 1
                state.training_s += progress_s - started_s
                state.token_forwards += int(figures["rollout/token_forwards"])
                faults = self._runners.take_faults()
                self._tell_of_faults(faults)
                self._tell_of_restarts(figures)
                figures |= queue_figures
                figures["rollout/failed_answers"] = float(faults.failed_answers)
                figures["rollout/scoring_retries"] = float(faults.scoring_retries)
                figures["faults/attempts_without_update"] = float(self._attempts)
                self._attempts = 0
                figures["faults/resumes"] = float(state.restarts)
                figures["time/iteration_s"] = progress_s - started_s
                figures["total/token_forwards"] = float(state.token_forwards)
                self._tracking.log_metrics(figures, step=state.iteration)
                phase.advance(1, _note(figures))
                if state.iteration % self._config.checkpoint.every_iterations == 0:
                    self.save()
                check_interrupt()

    def save(self) -> None:
        """Checkpoint, acknowledge what it contains, and start over from it: a barrier.

        Does nothing where this iteration's checkpoint exists: nothing was learned since.
        With Redis away the checkpoint is written all the same, with the queue's last known
        position: what was delivered since comes again after a resume, and counts as duplicates.
        Raises LostPart when the queue or the learner is gone, DataError when it cannot be written.
        """
        if self._state.iteration == self._saved_iteration:
            return
        delivered: list[str] | None = None
        try:
            with redis_errors(self._redis_url):
                self._state.position = self._queue.position()
                delivered = self._queue.delivered()
        except QueueLost as error:
            raise LostPart(str(error)) from error
        except RetryableError as error:
            self._display.line(f"checkpoint {self._state.iteration}: {error}")
        learner = self._learners.state()
        self._state.unsent_metrics = self._tracking.unsent
        self._state.reward = self._rewards / self._answers if self._answers else None
        save_checkpoint(
            self._folder.checkpoints, self._state, learner, self._config.checkpoint.keep
        )
        # Without Redis the next call, with Redis back, makes up for it.
        if delivered is not None and self._acked(delivered):
            self._saved_iteration = self._state.iteration
            self._answers = self._rewards = 0.0
        self.barrier()

    def barrier(self) -> None:
        """Abandon open episodes and re-derive every generator from (seed, iteration, process).

        After this a run that continues and one that resumes here do the same.
        """
        iteration = self._state.iteration
        seed = derived_seed(self._config.seed, iteration, 0)
        seed_everything(seed)
        self._learners.seed(seed)
        self._runners.restart(iteration)

    def _acked(self, delivered: list[str]) -> bool:
        try:
            with redis_errors(self._redis_url):
                self._queue.ack_delivered(delivered)
        except QueueLost as error:
            raise LostPart(str(error)) from error
        except RetryableError as error:
            self._display.line(f"checkpoint {self._state.iteration}: {error}")
            return False
        return True

    def _iterate(self) -> dict[str, float] | None:
        """One iteration's metrics; None when it brought no update."""
        # Before the update actors may take this twice: to get ready, and to sample.
        actors_s = 2 * self._config.rollouts.sample_timeout_s
        try:
            with self._learners.watched(actors_s):  # of actors RLlib raises nothing
                result = self._algorithm.train()
            figures = self._figures(result)
        except LostPart:
            raise
        except RetryableError as error:  # Redis went away as the prompts of a batch were noted
            self._outage = str(error)
            self._unsure = True
            figures = None
        self._replace_silent_runners()
        return figures

    def _replace_silent_runners(self) -> None:
        dropped = self._algorithm.env_runner_group.num_env_runners_dropped_lifetime()
        if dropped == self._dropped_replies:
            return
        self._dropped_replies = dropped
        for number in self._runners.replace_silent():
            self._display.line(
                f"rollout actor {number} gave no sample for "
                f"{self._config.rollouts.sample_timeout_s:g} s (rollouts.sample_timeout_s) and is "
                "replaced"
            )

    def _tell_of_faults(self, faults: Faults) -> None:
        iteration = self._state.iteration
        failed, retries, failure_causes, retry_causes = faults
        if failed:
            self._display.line(
                f"iteration {iteration}: {failed} answers failed and were not trained on: "
                f"{'; '.join(sorted(failure_causes))}"
            )
        if retries:
            self._display.line(
                f"iteration {iteration}: scores were asked for again {retries} times: "
                f"{'; '.join(sorted(retry_causes))}"
            )
        if self._outage:
            self._display.line(f"iteration {iteration}: {self._outage}")
            self._outage = ""

    def _tell_of_restarts(self, figures: dict[str, float]) -> None:
        restarts = (
            self._algorithm.env_runner_group.num_remote_worker_restarts()
            + self._algorithm.unnoticed_restarts
        )
        figures["faults/runner_restarts"] = float(restarts - self._runner_restarts)
        self._runner_restarts = restarts
        if reason := self._runner_errors.last():
            self._display.line(
                f"iteration {self._state.iteration}: a rollout actor failed and is replaced: "
                f"{reason}"
            )

    def _queue_figures(self) -> dict[str, float]:
        """The queue's metrics, {} while Redis is away.

        Raises LostPart when the queue is gone, or may hold as delivered what was not learned from.
        """
        try:
            with redis_errors(self._redis_url):
                self._queue.check_present()
                self._seen = self._queue.seen()
                status = self._queue.status()
        except QueueLost as error:
            try:
                with redis_errors(self._redis_url):
                    self._queue.remember(self._seen, self._duplicates)
            except RetryableError as away:  # again: duplicates will not be known as such
                self._display.line(f"iteration {self._state.iteration}: {away}")
            raise LostPart(str(error)) from error
        except RetryableError as error:
            self._outage = str(error)
            return {}
        if self._unsure:
            # Acknowledged with the next checkpoint, they would be lost.
            raise LostPart("Redis was away when answers reached the learner")
        self._duplicates = status.duplicates
        return {
            "queue/waiting": float(status.waiting),
            "queue/dead": float(status.dead),
            "queue/duplicates": float(status.duplicates),
        }

    def _explain_no_progress(self) -> None:
        alive = self._algorithm.env_runner_group.num_healthy_remote_workers()
        self._display.line(
            f"iteration {self._state.iteration + 1} brought nothing to learn from, trying again; "
            f"{alive} of {self._config.rollouts.num_runners} runners alive: {self._causes()}"
        )

    def _causes(self) -> str:
        """What was reported since the last call; where nothing was, what was reported before."""
        causes = [self._outage, self._runner_errors.last(), *self._runners.last_failures()]
        self._outage = ""
        news = "; ".join(cause for cause in causes if cause)
        self._known_causes = news or self._known_causes
        return self._known_causes or "no cause reported"

    def _out_of_time(self) -> bool:
        minutes = self._config.ppo.minutes
        return minutes is not None and self._state.training_s >= minutes * 60

    def _figures(self, result: Mapping[str, Any]) -> dict[str, float] | None:
        """The iteration's metrics, or None when it brought no fresh samples or no update."""
        learner = result.get("learners", {}).get("__all_modules__", {})
        lifetime = float(learner.get("num_module_steps_trained_lifetime", 0))
        if "env_runners" not in result or lifetime <= self._trained_rows:
            return None
        self._trained_rows = lifetime
        rollout = result["env_runners"].get("mara", {})
        updates = result["learners"]["mara"]
        policy = result["learners"]["default_policy"]
        figures = _rollout_figures(rollout)
        answers = figures["rollout/answers"]
        self._answers += answers
        self._rewards += answers * figures.get("rollout/reward", 0.0)
        decisions = figures.get("rollout/decisions", 0.0)
        tokens = figures.get("rollout/response_tokens", 0.0)
        kl_per_decision = updates["kl_sum"] / max(1, updates["kl_decisions"])
        steps = result["env_runners"]["num_env_steps_sampled"]
        figures |= {
            "rollout/token_forwards": float(steps) + figures.get("rollout/prefill_tokens", 0.0),
            "rollout/steps": float(steps),
            "learner/rows": float(updates["rows"]),
            "learner/kl_per_decision": float(kl_per_decision),
            "learner/explained_variance": float(updates["explained_variance"]),
            "learner/entropy": float(policy["entropy"]),
            "learner/vf_loss": float(policy["vf_loss"]),
            "learner/policy_loss": float(policy["policy_loss"]),
            "learner/gradient_norm": float(policy["gradients_default_optimizer_global_norm"]),
            "time/sampling_s": float(result["timers"]["env_runner_sampling_timer"]),
            "time/update_s": float(result["timers"]["learner_update_timer"]),
        }
        if tokens and decisions:
            forced = figures["rollout/forced_steps"]
            figures["rollout/accept_rate"] = (tokens - forced) / decisions
            figures["learner/kl_per_token"] = float(kl_per_decision) * decisions / tokens
        return figures


def _rollout_figures(rollout: Mapping[str, Any]) -> dict[str, float]:
    """Counts as they are, rewards and scores as means over the answers, where there are any."""
    answers = float(rollout["answers"])
    figures = {}
    for key, value in rollout.items():
        if key == "reward" or key.startswith("score_"):
            if answers:
                figures[f"rollout/{key}"] = float(value) / answers
        else:
            figures[f"rollout/{key}"] = float(value)
    return figures


def _note(figures: Mapping[str, float]) -> str:
    shown = {
        "reward": "rollout/reward",
        "KL/token": "learner/kl_per_token",
        "accept": "rollout/accept_rate",
        "expl.var": "learner/explained_variance",
    }
    scores = {
        key.removeprefix("rollout/score_"): key
        for key in figures
        if key.startswith("rollout/score_")
    }
    return " ".join(f"{k} {figures[v]:.2f}" for k, v in {**shown, **scores}.items() if v in figures)
