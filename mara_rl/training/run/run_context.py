"""What stays the same from a run's start to its end, also when it goes back to a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from mara_rl.agents.agent import AgentSpec
from mara_rl.common.display import Display
from mara_rl.tracking.tracking_run import TrackingRun
from mara_rl.training.config import TrainConfig
from mara_rl.training.run.prompt_sets import PromptSets
from mara_rl.training.run.run_folder import RunFolder
from mara_rl.training.run.session import Session


@dataclass(frozen=True)
class RunContext:
    """A training run: what it was asked for, and what it stands on.

    Attributes:
        prompts: as they are in the config's files.
        check_interrupt: raises `Interrupted` where the run was asked to stop; for safe points.
    """

    config: TrainConfig
    folder: RunFolder
    spec: AgentSpec
    prompts: PromptSets
    session: Session
    tracking: TrackingRun
    display: Display
    check_interrupt: Callable[[], None]
