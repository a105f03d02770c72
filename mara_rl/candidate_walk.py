"""S sequences that grow by looking at candidates one at a time: the method's state machine.

Both the environment (where an RL policy accepts or rejects) and decoding (where a rule does) drive
this one implementation.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from mara_rl.candidates import CandidateSets, candidate_sets
from mara_rl.slot_engine import SlotEngine

ACCEPT: Final = -1
"""Move: the pending candidate becomes the next token. Any other move is the index to look at."""


class CandidateWalk:
    """Per slot: a prompt being prefilled, then a set of candidates, one of them pending.

    Attributes (S slots, K candidates, H hidden size; on the LLM's device unless noted):
        h: hidden state with the pending candidate appended (S, H).
        h_prefix: hidden state of the last accepted (or last prompt) token (S, H).
        index: which candidate is pending (S,), int64, CPU.
        active: slots with a pending candidate (S,), bool, CPU.
        tokens: accepted response token ids per slot, lists.
        ids, probs, mass_left, base_logits (S, K), counts (S,): each slot's set, on the CPU.
    """

    def __init__(
        self,
        engine: SlotEngine,
        *,
        top_k: int,
        top_p: float,
        prefill_chunk_tokens: int = 512,
        first_index: Callable[[CandidateSets, Sequence[int]], Tensor] | None = None,
    ) -> None:
        """``first_index`` picks the candidate (R,) looked at first of new sets of these slots."""
        slots, hidden = engine.num_slots, engine.llm.hidden_size
        self.engine = engine
        self.top_k, self.top_p = top_k, top_p
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.first_index = first_index
        state = {"device": engine.llm.device, "dtype": engine.llm.model.dtype}
        self.h = torch.zeros(slots, hidden, **state)
        self.h_prefix = torch.zeros(slots, hidden, **state)
        self.index = torch.zeros(slots, dtype=torch.long)
        self.active = torch.zeros(slots, dtype=torch.bool)
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.ids = torch.zeros(slots, top_k, dtype=torch.long)
        self.probs = torch.zeros(slots, top_k)
        self.mass_left = torch.zeros(slots, top_k)
        self.base_logits = torch.zeros(slots, top_k)
        self.counts = torch.ones(slots, dtype=torch.long)
        self._prompts: dict[int, list[int]] = {}

    @property
    def forced(self) -> Tensor:
        """Slots whose pending candidate is their set's last (S,), bool: there is no choice."""
        return self.index >= self.counts - 1

    @property
    def prefilling(self) -> Tensor:
        """Slots whose prompt is not yet wholly read (S,), bool."""
        waiting = torch.zeros(self.engine.num_slots, dtype=torch.bool)
        waiting[list(self._prompts)] = True
        return waiting

    def pending_ids(self) -> Tensor:
        """The pending candidates' token ids (S,), int64."""
        return self.ids.gather(1, self.index[:, None])[:, 0]

    def start(self, slot: int, prompt_ids: Sequence[int]) -> None:
        """Give a slot a new prompt; `step` reads it, a chunk at a time."""
        self.stop([slot])
        self._prompts[slot] = list(prompt_ids)
        self.tokens[slot] = []

    def stop(self, slots: Sequence[int]) -> None:
        """Make slots idle and forget their sequences."""
        self.active[list(slots)] = False
        for slot in slots:
            self._prompts.pop(slot, None)
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
        grown += self._prefill()
        if grown:
            self._new_sets(grown)
        self.h = self.engine.propose(self.pending_ids())

    def _prefill(self) -> list[int]:
        """Read the next chunk of every waiting prompt; the slots whose prompt is now complete.

        Slots that are equally far in the same prompt share one row of the forward.
        """
        if not self._prompts:
            return []
        sharing: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in sorted(self._prompts.items()):
            sharing.setdefault((int(self.engine.lengths[slot]), *ids), []).append(slot)
        chunks, owners, followers = [], [], []
        for (done, *ids), (owner, *others) in sharing.items():
            chunks.append(ids[done : done + self.prefill_chunk_tokens])
            owners.append(owner)
            followers += [(owner, other) for other in others]
        self.h_prefix[owners] = self.engine.prefill(owners, chunks)
        if followers:
            sources, targets = (list(slots) for slots in zip(*followers, strict=True))
            self.engine.copy(sources, targets)
            self.h_prefix[targets] = self.h_prefix[sources]
        lengths = self.engine.lengths.tolist()
        complete = [slot for slot, ids in self._prompts.items() if lengths[slot] == len(ids)]
        for slot in complete:
            del self._prompts[slot]
        return complete

    def _new_sets(self, slots: list[int]) -> None:
        sets = candidate_sets(self.engine.logits(self.h_prefix[slots]), self.top_k, self.top_p)
        width = sets.ids.shape[1]
        self.ids[slots, :width] = sets.ids.cpu()
        self.probs[slots, :width] = sets.probs.cpu()
        self.mass_left[slots, :width] = sets.mass_left.cpu()
        self.base_logits[slots, :width] = sets.base_logits.cpu()
        self.counts[slots] = sets.counts.cpu()
        first = None if self.first_index is None else self.first_index(sets, slots)
        self.index[slots] = 0 if first is None else first.cpu()
        self.active[slots] = True
