"""What went wrong in an iteration: on lines of the display, and in figures."""

from collections.abc import Sequence
from typing import NamedTuple

from mara_rl.common.display import Display
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.runner_errors import RunnerErrors


class Faults(NamedTuple):
    """What went wrong in rollout actors.

    Attributes:
        failed_answers: how many answers failed.
        scoring_retries: how often scores were asked for again.
        failure_causes: why, the first few reasons of each actor.
        retry_causes: why, the last reason of each actor that had to.
    """

    failed_answers: int = 0
    scoring_retries: int = 0
    failure_causes: frozenset[str] = frozenset()
    retry_causes: frozenset[str] = frozenset()

    def __add__(self, other: "Faults") -> "Faults":  # type: ignore[override]
        return Faults(
            self.failed_answers + other.failed_answers,
            self.scoring_retries + other.scoring_retries,
            self.failure_causes | other.failure_causes,
            self.retry_causes | other.retry_causes,
        )


class FaultReport:
    """Shows the faults of iterations; what one without an update had counts in the next."""

    def __init__(self, config: TrainConfig, display: Display) -> None:
        self._rollouts = config.rollouts
        self._display = display
        self._runner_errors = RunnerErrors()
        self._outage = ""
        self._causes = ""  # reported last, since the last update
        self._attempts = 0  # at an update, in vain
        self._restarts = 0

    def outage(self, error: Exception) -> None:
        """Redis was away; shown with the iteration that is reported next."""
        self._outage = str(error)

    def replaced(self, number: int) -> None:
        """A rollout actor is replaced for its silence."""
        self._display.line(
            f"rollout actor {number} gave no sample for "
            f"{self._rollouts.sample_timeout_s:g} s (rollouts.sample_timeout_s) and is replaced"
        )

    def no_update(self, iteration: int, runners_alive: int, failures: Sequence[str]) -> None:
        """An attempt at this iteration brought no update. ``failures``: why answers failed.

        Where no cause is new, what was reported before is shown again.
        """
        self._attempts += 1
        news = [self._take_outage(), self._runner_errors.last(), *failures]
        self._causes = "; ".join(cause for cause in news if cause) or self._causes
        self._display.line(
            f"iteration {iteration} brought nothing to learn from, trying again; "
            f"{runners_alive} of {self._rollouts.num_runners} runners alive: "
            f"{self._causes or 'no cause reported'}"
        )

    def update(self, iteration: int, faults: Faults, restarts: int) -> dict[str, float]:
        """The figures of an iteration with an update. ``restarts``: of all actors so far."""
        lines = []
        if faults.failed_answers:
            causes = "; ".join(sorted(faults.failure_causes))
            lines.append(
                f"{faults.failed_answers} answers failed and were not trained on: {causes}"
            )
        if faults.scoring_retries:
            causes = "; ".join(sorted(faults.retry_causes))
            lines.append(f"scores were asked for again {faults.scoring_retries} times: {causes}")
        if outage := self._take_outage():
            lines.append(outage)
        if reason := self._runner_errors.last():
            lines.append(f"a rollout actor failed and is replaced: {reason}")
        for line in lines:
            self._display.line(f"iteration {iteration}: {line}")
        figures = {
            "rollout/failed_answers": float(faults.failed_answers),
            "rollout/scoring_retries": float(faults.scoring_retries),
            "faults/runner_restarts": float(restarts - self._restarts),
            "faults/attempts_without_update": float(self._attempts),
        }
        self._causes, self._attempts, self._restarts = "", 0, restarts
        return figures

    def _take_outage(self) -> str:
        outage, self._outage = self._outage, ""
        return outage
