"""The prompts a run trains on and the held-out ones it is measured on."""

from pathlib import Path
from typing import Literal

from services.prompt_files import PromptRecord, read_prompts


def load_prompts(name: str, split: Literal["train", "heldout"]) -> list[PromptRecord]:
    """The packaged prompts of a split (``packaged``), or those of a file."""
    if name != "packaged":
        return read_prompts(Path(name))
    from mara_rl.prompts import packaged_prompts

    return [
        PromptRecord(p.id, p.prompt, {"kind": p.kind, "category": p.category})
        for p in packaged_prompts(split)
    ]
