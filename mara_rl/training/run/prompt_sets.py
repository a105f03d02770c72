"""The prompts of a run, and what it must know of them before it uses them."""

from dataclasses import dataclass

from mara_rl.common.display import Display
from mara_rl.common.errors import DataError
from mara_rl.evaluation.prompt_set import normalised
from mara_rl.prompts.prompt_files import PromptRecord, load_prompts
from mara_rl.training.config import TrainConfig
from mara_rl.training.rllib.rollout_group import RolloutGroup


@dataclass(frozen=True)
class PromptSets:
    """Prompts to train on, and held-out ones, of which a run without an evaluation has none."""

    train: list[PromptRecord]
    heldout: list[PromptRecord]

    @classmethod
    def load(cls, config: TrainConfig, display: Display) -> "PromptSets":
        """Those that the config names. Raises DataError."""
        train = load_prompts(config.prompts.train, "train")
        heldout = load_prompts(config.prompts.heldout, "heldout") if config.evaluation else []
        tell_of_shared_prompts(train, heldout, display)
        return cls(train, heldout)

    def fitting(self, runners: RolloutGroup, display: Display) -> tuple["PromptSets", "PromptSets"]:
        """Those the LLM's context has room for, and the others, which are named on a line.

        Raises DataError when all of a set are too long.
        """
        train, too_long = _fitting(self.train, "train", runners, display)
        heldout, unanswered = _fitting(self.heldout, "heldout", runners, display)
        return PromptSets(train, heldout), PromptSets(too_long, unanswered)


def _fitting(
    prompts: list[PromptRecord], split: str, runners: RolloutGroup, display: Display
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    if not prompts:
        return [], []
    fits = runners.fits_context([prompt.text for prompt in prompts])
    kept = [prompt for prompt, ok in zip(prompts, fits, strict=True) if ok]
    left_out = [prompt for prompt, ok in zip(prompts, fits, strict=True) if not ok]
    if not left_out:
        return kept, []
    line = (
        f"prompts.{split}: {len(left_out)} of {len(prompts)} prompts do not fit the "
        f"LLM's context beside an answer (the first: {left_out[0].prompt_id!r})"
    )
    if not kept:
        raise DataError(line)
    display.line(f"{line}; left out")
    return kept, left_out


def tell_of_shared_prompts(
    train: list[PromptRecord], heldout: list[PromptRecord], display: Display
) -> None:
    """Say on a line how many held-out prompts training sees, compared by their words."""
    trained = {normalised(prompt.text) for prompt in train}
    shared = [prompt for prompt in heldout if normalised(prompt.text) in trained]
    if shared:
        display.line(
            f"prompts.heldout: {len(shared)} of {len(heldout)} prompts are in prompts.train as "
            f"well (the first: {shared[0].prompt_id!r}); the comparison will flatter the agent"
        )
