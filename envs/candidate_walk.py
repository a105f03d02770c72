"""S sequences that grow by looking at candidates one at a time, as an RL policy decides."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mara_rl.llm.candidates import CandidateRule, CandidateSets, candidate_sets
from mara_rl.llm.prefill import PromptReader
from mara_rl.llm.slot_engine import SlotEngine

ACCEPT: Final = -1
"""Move: the pending candidate becomes the next token. Any other move is the index to look at."""


class CandidateWalk:
    """Per slot: a prompt being read, then a set of candidates, one of them pending.

    Attributes (S slots, K candidates, H hidden size):
        h: hidden state with the pending candidate appended (S, H), on the LLM's device.
        h_prefix: hidden state of the last accepted (or last prompt) token (S, H), likewise.
        index: which candidate is pending (S,), int64, CPU.
        active: slots with a pending candidate (S,), bool, CPU.
        tokens: accepted response token ids per slot, lists.
        sets: each slot's set of candidates.
    """

    def __init__(
        self, engine: SlotEngine, rule: CandidateRule, *, prefill_chunk_tokens: int = 512
    ) -> None:
        slots, hidden = engine.num_slots, engine.llm.hidden_size
        self.engine = engine
        self.rule = rule
        state = {"device": engine.llm.device, "dtype": engine.llm.model.dtype}
        self.h = torch.zeros(slots, hidden, **state)
        self.h_prefix = torch.zeros(slots, hidden, **state)
        self.index = torch.zeros(slots, dtype=torch.long)
        self.active = torch.zeros(slots, dtype=torch.bool)
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.sets = CandidateSets.empty(slots, rule.top_k)
        self._reader = PromptReader(engine, prefill_chunk_tokens)

    @property
    def forced(self) -> Tensor:
        """Slots whose pending candidate is their set's last (S,), bool: there is no choice."""
        return self.index >= self.sets.counts - 1

    @property
    def prefilling(self) -> Tensor:
        """Slots whose prompt is not yet wholly read (S,), bool."""
        waiting = torch.zeros(self.engine.num_slots, dtype=torch.bool)
        waiting[self._reader.waiting] = True
        return waiting

    def pending_ids(self) -> Tensor:
        """The pending candidates' token ids (S,), int64."""
        return self.sets.ids.gather(1, self.index[:, None])[:, 0]

    def start(self, slot: int, prompt_ids: Sequence[int]) -> None:
        """Give a slot a new prompt; `step` reads it, a chunk at a time."""
        self.stop([slot])
        self._reader.start(slot, prompt_ids)
        self.tokens[slot] = []

    def stop(self, slots: Sequence[int]) -> None:
        """Make slots idle and forget their sequences."""
        self.active[list(slots)] = False
        self._reader.drop(slots)
        self.engine.clear(slots)

    def step(self, moves: Tensor) -> None:
        """Apply one move per active slot, read one prompt chunk per new slot, look once.

        ``moves`` (S,), int64: `ACCEPT`, or the index of the candidate to look at next. Moves of
        slots that are not active are ignored. Costs one forward of S tokens, and one of the prompt
        chunks if there are any.
        """
        accepted = self.active & (moves == ACCEPT)
        self.engine.commit(accepted)
        self.index = torch.where(self.active & ~accepted, moves, self.index)
        grown = accepted.nonzero()[:, 0].tolist()
        for slot, token in zip(grown, self.pending_ids()[accepted].tolist(), strict=True):
            self.tokens[slot].append(token)
        self.h_prefix[grown] = self.h[grown]
        complete, states = self._reader.read()
        self.h_prefix[complete] = states.to(self.h_prefix.dtype)
        grown += complete
        if grown:
            logits = self.engine.logits(self.h_prefix[grown])
            self.sets.put(grown, candidate_sets(logits, self.rule))
            self.index[grown] = 0
            self.active[grown] = True
        self.h = self.engine.propose(self.pending_ids())
