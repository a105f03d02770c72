"""What the environment needs from outside: a source of prompts and a scorer of answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt handed to a slot.

    ``prompt_id`` names the prompt; ``entry_id`` names this delivery of it (a queue entry), "" when
    the source keeps no account of deliveries.
    """

    text: str
    prompt_id: str
    entry_id: str = ""


@runtime_checkable
class PromptSource(Protocol):
    """Hands out prompts one by one. Implementations may block until one is there."""

    def next(self) -> Prompt:
        """The next prompt. Raises RetryableError when none comes within the source's deadline."""
        ...

    def reject(self, prompt: Prompt, reason: str) -> None:
        """Take a prompt that can never be answered (empty, too long) out of circulation."""
        ...

    def fail(self, prompt: Prompt, reason: str) -> None:
        """The prompt's episode failed through no fault of its own; it may be tried again."""
        ...

    def restart(self, generator: np.random.Generator) -> None:
        """Begin again: unfinished prompts are handed out anew, drawing order from ``generator``."""
        ...

    def close(self) -> None:
        """Give back what is unfinished."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores answers, many at a time."""

    names: tuple[str, ...]
    """The names of the scores, e.g. ``("reward", "cost")``."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (len(pairs), len(names)), float64, of (prompt, response) pairs.

        A score that could not be had is NaN, never a made-up number. Raises RetryableError when no
        score could be had at all.
        """
        ...
