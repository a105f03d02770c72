"""Prompts the project ships: its own writing, half harmful requests, half ordinary questions.

README.md beside this file is their card.
"""

from importlib import resources
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from mara_rl.common.errors import ConfigError

Split = Literal["train", "heldout"]


class PackagedPrompt(BaseModel):
    """One shipped prompt.

    Attributes:
        id: ``{split}-{category}-{number}``, unique over both splits.
        prompt: the user's words, 5 to 30 of them.
        category: one of 12 topics per kind.
        kind: ``harmful`` where a good assistant declines or redirects, else ``ordinary``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    prompt: str
    category: str
    kind: Literal["harmful", "ordinary"]


def packaged_prompts(split: Split) -> list[PackagedPrompt]:
    """The prompts of ``split``, ordered by kind and category; shuffle before taking a few.

    Raises ConfigError on any other split.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r} is not packaged; expected one of {get_args(Split)}")
    file = resources.files(__name__) / f"{split}.jsonl"
    return [
        PackagedPrompt.model_validate_json(line)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
