"""Prompts from a list: no Redis, for one environment in one process."""

from collections.abc import Sequence

import numpy as np

from envs.protocols import Prompt
from mara_rl.common.errors import DataError


class ListPromptSource:
    """Hands out a list of prompts for ever, each pass in a new order drawn from the generator."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            raise DataError("prompts: an empty list; expected at least one prompt")
        self._usable = list(prompts)
        self._queue: list[Prompt] = []
        self._generator = np.random.default_rng(0)

    def next(self) -> Prompt:
        if not self._queue:
            order = self._generator.permutation(len(self._usable))
            self._queue = [self._usable[i] for i in order]
        return self._queue.pop(0)

    def reject(self, prompt: Prompt, reason: str) -> None:
        self._usable = [p for p in self._usable if p.prompt_id != prompt.prompt_id]
        self._queue = [p for p in self._queue if p.prompt_id != prompt.prompt_id]
        if not self._usable:
            raise DataError(f"prompts: none of them can be answered; the last one: {reason}")

    def fail(self, prompt: Prompt, reason: str) -> None:
        """Nothing to do: the prompt comes again with the next pass."""

    def restart(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._queue = []

    def close(self) -> None:
        """Nothing is held."""
