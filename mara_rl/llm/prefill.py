"""Reading prompts into slots, a chunk at a time, so that running slots do not stall."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mara_rl.llm.slot_engine import SlotEngine


class PromptReader:
    """Prompts being read into slots of an engine."""

    def __init__(self, engine: SlotEngine, chunk_tokens: int) -> None:
        self._engine = engine
        self._chunk_tokens = chunk_tokens
        self._prompts: dict[int, list[int]] = {}

    @property
    def waiting(self) -> list[int]:
        """Slots whose prompt is not yet wholly read."""
        return list(self._prompts)

    def start(self, slot: int, prompt_ids: Sequence[int]) -> None:
        """Give a slot a prompt; what it held is forgotten."""
        self._engine.clear([slot])
        self._prompts[slot] = list(prompt_ids)

    def drop(self, slots: Sequence[int]) -> None:
        """Stop reading these slots' prompts, where any are being read."""
        for slot in slots:
            self._prompts.pop(slot, None)

    def read(self) -> tuple[list[int], Tensor]:
        """Read the next chunk of every prompt.

        Slots that are equally far in the same prompt share one row of the forward.

        Returns the slots whose prompt is now complete (R) and the hidden states (R, H) of their
        prompts' last tokens.
        """
        engine = self._engine
        if not self._prompts:
            return [], torch.empty(0, engine.llm.hidden_size, device=engine.llm.device)
        sharing: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in sorted(self._prompts.items()):
            sharing.setdefault((int(engine.lengths[slot]), *ids), []).append(slot)
        chunks = [ids[done : done + self._chunk_tokens] for done, *ids in sharing]
        hidden = engine.prefill([owner for owner, *_ in sharing.values()], chunks)
        shared = [(owner, other) for owner, *others in sharing.values() for other in others]
        if shared:
            sources, targets = (list(slots) for slots in zip(*shared, strict=True))
            engine.copy(sources, targets)
        lengths = engine.lengths.tolist()
        complete, rows = [], []
        for row, slots in enumerate(sharing.values()):
            if lengths[slots[0]] == len(self._prompts[slots[0]]):
                complete += slots
                rows += [row] * len(slots)
        self.drop(complete)
        return complete, hidden[rows]
