"""What a run must know of its prompts before it uses them."""

from mara_rl.common.display import Display
from mara_rl.common.errors import DataError
from mara_rl.evaluation.prompt_set import normalised
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.training.rllib.rollout_group import RolloutGroup


def fitting_prompts(
    prompts: list[PromptRecord], split: str, runners: RolloutGroup, display: Display
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Those the LLM's context has room for, and the others, which are named on a line.

    Raises DataError when there is none.
    """
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
