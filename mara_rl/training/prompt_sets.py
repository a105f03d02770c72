"""Prompts that fit the LLM of a run."""

from mara_rl.display import Display
from mara_rl.errors import DataError
from mara_rl.training.rollout_group import RolloutGroup
from services.prompt_files import PromptRecord


def fitting_prompts(
    prompts: list[PromptRecord], split: str, runners: RolloutGroup, display: Display
) -> list[PromptRecord]:
    """Those the LLM's context has room for; the others are named on a line.

    Raises DataError when there is none.
    """
    fits = runners.fits_context([prompt.text for prompt in prompts])
    kept = [prompt for prompt, ok in zip(prompts, fits, strict=True) if ok]
    if len(kept) == len(prompts):
        return kept
    first = prompts[fits.index(False)].prompt_id
    line = (
        f"prompts.{split}: {len(prompts) - len(kept)} of {len(prompts)} prompts do not fit the "
        f"LLM's context beside an answer (the first: {first!r})"
    )
    if not kept:
        raise DataError(line)
    display.line(f"{line}; left out")
    return kept
