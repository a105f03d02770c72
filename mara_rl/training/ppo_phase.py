"""The PPO phase: iterations, and checkpoints that are barriers."""

import time
from collections.abc import Callable

from mara_rl.common.errors import RetryableError
from mara_rl.training.faults.fault_report import FaultReport
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.rllib.iteration_figures import (
    iteration_figures,
    learned_entries,
    progress_note,
    rows_trained,
)
from mara_rl.training.rllib.rollout_group import derived_seed, seed_everything
from mara_rl.training.rllib.workers import Workers
from mara_rl.training.run.checkpoint import TrainState, save_checkpoint
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.run_queue import RunQueue

_RETRY_WAIT_S = 2.0


class PPOPhase:
    """Runs iterations of an algorithm until the budget is spent or the user interrupts."""

    def __init__(
        self, run: RunContext, workers: Workers, queue: RunQueue, state: TrainState
    ) -> None:
        self._run = run
        self._workers = workers
        self._queue = queue
        self._state = state
        self._faults = FaultReport(run.config, run.display)
        self._rows_trained = 0.0
        self._dropped_samples = 0
        self._answers = self._rewards = 0.0  # since the last checkpoint
        # A resumed run starts from the checkpoint of its iteration.
        self._saved_iteration = state.iteration if state.position is not None else -1

    def run(self) -> None:
        """Train until the configured iterations or minutes.

        Raises RetryableError, after a checkpoint, when nothing is learned for
        ``ppo.no_progress_timeout_s``, and LostPart when going on takes a restart.
        """
        config, state, display = self._run.config, self._state, self._run.display
        progress_s = time.monotonic()
        with display.phase("PPO", total=config.ppo.iterations, done=state.iteration) as phase:
            while state.iteration < config.ppo.iterations and not self._out_of_time():
                started_s = time.monotonic()
                figures = self._iterate()
                queue_figures = self._queue_figures()
                if figures is None:
                    self._try_again_after(progress_s)
                    continue
                progress_s = time.monotonic()
                figures |= queue_figures
                self._log(figures, progress_s - started_s)
                phase.advance(1, progress_note(figures))
                if state.iteration % config.checkpoint.every_iterations == 0:
                    self.save()
                self._run.check_interrupt()

    def save(self) -> None:
        """Checkpoint, acknowledge what it contains, and start over from it: a barrier.

        Does nothing where this iteration's checkpoint exists: nothing was learned since.
        With Redis away the checkpoint is written all the same, with the queue's last known
        position: what was delivered since comes again after a resume, and counts as duplicates.
        Raises LostPart when the queue or the learner is gone, DataError when it cannot be written.
        """
        run, state = self._run, self._state
        if state.iteration == self._saved_iteration:
            return
        positioned = self._with_redis(self._take_position)
        learner = self._workers.learners.state()
        state.unsent_metrics = run.tracking.unsent
        state.reward = self._rewards / self._answers if self._answers else None
        save_checkpoint(run.folder.checkpoints, state, learner, run.config.checkpoint.keep)
        # Without Redis the next call, with Redis back, makes up for it.
        if positioned and self._with_redis(self._queue.acknowledge):
            self._saved_iteration = state.iteration
            self._answers = self._rewards = 0.0
        self.barrier()

    def barrier(self) -> None:
        """Abandon open episodes and re-derive every generator from (seed, iteration, process).

        After this a run that continues and one that resumes here do the same.
        """
        iteration = self._state.iteration
        seed = derived_seed(self._run.config.seed, iteration, 0)
        seed_everything(seed)
        self._workers.learners.seed(seed)
        self._workers.runners.restart(iteration)

    def _iterate(self) -> dict[str, float] | None:
        """One iteration's metrics; None when it brought no update."""
        # Before the update actors may take this twice: to get ready, and to sample.
        actors_s = 2 * self._run.config.rollouts.sample_timeout_s
        with self._workers.learners.watched(actors_s):  # of actors RLlib raises nothing
            result = self._workers.algorithm.train()
        self._replace_silent_runners()
        rows = rows_trained(result)
        if rows <= self._rows_trained:
            return None
        self._rows_trained = rows
        self._queue.learned_from(learned_entries(result))
        return iteration_figures(result)

    def _replace_silent_runners(self) -> None:
        dropped = self._workers.runners.num_dropped_samples
        if dropped > self._dropped_samples:
            self._dropped_samples = dropped
            for number in self._workers.runners.replace_silent():
                self._faults.replaced(number)

    def _queue_figures(self) -> dict[str, float]:
        """The queue's metrics, {} while Redis is away. Raises LostPart when the queue is gone."""
        try:
            return self._queue.figures()
        except LostPart:
            raise
        except RetryableError as error:
            self._faults.outage(error)
            return {}

    def _try_again_after(self, progress_s: float) -> None:
        """Tell why there was no update, and wait; the last one was at ``progress_s``."""
        workers, state = self._workers, self._state
        workers.learners.check()
        limit_s = self._run.config.ppo.no_progress_timeout_s
        if time.monotonic() - progress_s > limit_s:
            self.save()
            raise RetryableError(
                f"no update for {limit_s:g} s (ppo.no_progress_timeout_s); "
                f"checkpoint {state.iteration} is saved"
            )
        runners = workers.runners
        self._faults.no_update(state.iteration + 1, runners.num_alive, runners.last_failures())
        self._run.check_interrupt()
        time.sleep(_RETRY_WAIT_S)

    def _log(self, figures: dict[str, float], took_s: float) -> None:
        """Count an update into the state, and log its figures with those of faults and totals."""
        state, runners = self._state, self._workers.runners
        state.iteration += 1
        state.training_s += took_s
        state.token_forwards += int(figures["rollout/token_forwards"])
        answers = figures["rollout/answers"]
        self._answers += answers
        self._rewards += answers * figures.get("rollout/reward", 0.0)
        faults = self._faults.update(state.iteration, runners.take_faults(), runners.num_restarts)
        figures |= faults
        figures["faults/resumes"] = float(state.restarts)
        figures["time/iteration_s"] = took_s
        figures["total/token_forwards"] = float(state.token_forwards)
        self._run.tracking.log_metrics(figures, step=state.iteration)

    def _take_position(self) -> None:
        self._state.position = self._queue.position()

    def _with_redis(self, step: Callable[[], None]) -> bool:
        """Take a step of a checkpoint; False, told on a line, while Redis is away."""
        try:
            step()
        except LostPart:
            raise
        except RetryableError as error:
            self._run.display.line(f"checkpoint {self._state.iteration}: {error}")
            return False
        return True

    def _out_of_time(self) -> bool:
        minutes = self._run.config.ppo.minutes
        return minutes is not None and self._state.training_s >= minutes * 60
