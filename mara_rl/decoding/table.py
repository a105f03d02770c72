"""The numbers of S slots while they decode: candidates, and what was seen of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mara_rl.llm.candidates import CandidateSets


class DecodeTable:
    """One row per slot, one column per candidate; all on the CPU but hidden states.

    Attributes (S slots, K candidates, H hidden size):
        sets: each slot's candidates.
        looked: candidates looked at, from the first on (S,), int64.
        place: where each of them lies in the engine, counted from the slot's end (S, K), int64.
        terms: what `blended_terms` says of each candidate looked at (S, K, 2), float32.
        prefix_term: the second of these for the last token taken (S,).
        anchored: whether logit r_k is part of the accept log-odds (S,), bool.
        uniform: number in [0, 1) that `sample` inverts for the next token (S,), float64.
        h: hidden states of the candidates looked at (S, K, H), on the LLM's device.
        h_prefix: hidden state of the last token taken (S, H), likewise.
    """

    def __init__(self, num_slots: int, hidden_size: int, state: dict[str, Any]) -> None:
        """``state``: device and dtype of hidden states."""
        self.sets = CandidateSets.empty(num_slots, 1)
        self.looked = torch.zeros(num_slots, dtype=torch.long)
        self.place = torch.zeros(num_slots, 1, dtype=torch.long)
        self.terms = torch.zeros(num_slots, 1, 2)
        self.prefix_term = torch.zeros(num_slots)
        self.anchored = torch.ones(num_slots, dtype=torch.bool)
        self.uniform = torch.zeros(num_slots, dtype=torch.float64)
        self.h = torch.zeros(num_slots, 1, hidden_size, **state)
        self.h_prefix = torch.zeros(num_slots, hidden_size, **state)

    def begin(self, slots: Sequence[int], states: Tensor, terms: Tensor) -> None:
        """Prompts whose last tokens have these ``states`` (R, H) and ``terms`` (R, 2)."""
        self.h_prefix[slots] = states
        self.prefix_term[slots] = terms[:, 1]

    def open(self, slots: Sequence[int], sets: CandidateSets) -> None:
        """New candidates for these slots, none looked at yet."""
        width = sets.ids.shape[1]
        if width > self.sets.ids.shape[1]:
            self.sets = self.sets.widened(width)
            self.place = _widened(self.place, width)
            self.terms = _widened(self.terms, width)
            self.h = _widened(self.h, width)
        self.sets.put(slots, sets)
        self.looked[slots] = 0

    def record(
        self, slots: Tensor, columns: Tensor, places: Tensor, h: Tensor, terms: Tensor
    ) -> None:
        """Places (N,), states (N, H) and terms (N, 2) of candidates, by slot and column (N,)."""
        self.place[slots, columns] = places
        self.h[slots, columns] = h
        self.terms[slots, columns] = terms
        self.looked.index_add_(0, slots, torch.ones_like(slots))

    def adopt(self, slots: Tensor, other: "DecodeTable") -> None:
        """Take over what ``other`` knows of these slots' candidates, one place earlier."""
        looked = other.looked[slots]
        self.open(slots.tolist(), other.sets[slots])
        self.looked[slots] = looked
        width = other.place.shape[1]
        self.place[slots, :width] = other.place[slots] - 1
        self.terms[slots, :width] = other.terms[slots]
        self.h[slots, :width] = other.h[slots]

    def take(self, slots: Tensor, choice: Tensor) -> None:
        """Make candidate ``choice`` (R,) of these slots (R,) the last token taken."""
        self.h_prefix[slots] = self.h[slots, choice]
        self.prefix_term[slots] = self.terms[slots, choice, 1]

    def accept_logits(self, slots: Tensor) -> Tensor:
        """Accept log-odds (R, K) of these slots' candidates; only those looked at have meaning."""
        own = self.terms[slots, :, 0] - self.prefix_term[slots, None]
        base = torch.where(self.anchored[slots, None], self.sets.base_logits[slots], 0.0)
        return base + own


def _widened(columns: Tensor, width: int) -> Tensor:
    """(S, K, …) as (S, width, …), zeros in the new columns."""
    wide = columns.new_zeros(columns.shape[0], width, *columns.shape[2:])
    wide[:, : columns.shape[1]] = columns
    return wide
