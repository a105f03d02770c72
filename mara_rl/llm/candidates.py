"""The candidate tokens of a position: the LLM's distribution truncated, sorted and renormalised."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mara_rl.common.yaml_settings import Section

FORCED_LOGIT = 30.0
"""Stands for logit r_k = ∞ at the last candidate of a set, where there is no choice."""

TopK = Annotated[int, Field(ge=1, description="candidates kept by top-k")]
TopP = Annotated[float, Field(gt=0, le=1, description="mass kept by top-p, after top-k")]


class CandidateRule(Section):
    """How a position's distribution is truncated to its candidates; by default as in the paper."""

    top_k: TopK = 40
    top_p: TopP = 0.95

    @property
    def candidates(self) -> "CandidateRule":
        """The rule alone, of settings that have more."""
        return CandidateRule(top_k=self.top_k, top_p=self.top_p)


class CandidateOverrides(Section):
    """Parts of a `CandidateRule` that may be set; None keeps that of the agent."""

    top_k: TopK | None = None
    top_p: TopP | None = None

    def candidates_or(self, own: CandidateRule) -> CandidateRule:
        """The rule ``own`` with what is set here in place of it."""
        return CandidateRule(top_k=self.top_k or own.top_k, top_p=self.top_p or own.top_p)


@dataclass(frozen=True, slots=True)
class CandidateSets:
    """Candidates of R positions, padded to K columns; p_1 ≥ … ≥ p_n, Σ p = 1, padding 0.

    All on the CPU.

    Attributes:
        ids: token ids (R, K), int64.
        probs: p_k (R, K), float32.
        counts: n (R,), int64, at least 1.
        mass_left: Σ_{j≥k} p_j (R, K), float32.
        base_logits: logit r_k with r_k = p_k / Σ_{j≥k} p_j (R, K), float32; accepting candidate k
            with probability r_k, one after the other, samples exactly from p. `FORCED_LOGIT` from
            the last candidate on.
    """

    ids: Tensor
    probs: Tensor
    counts: Tensor
    mass_left: Tensor
    base_logits: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> "CandidateSets":
        """Sets of one candidate, token 0, to be overwritten."""
        zeros = torch.zeros(rows, width)
        return cls(
            zeros.long(),
            zeros.clone(),
            torch.ones(rows, dtype=torch.long),
            zeros.clone(),
            zeros.clone(),
        )

    def put(self, rows: Sequence[int] | Tensor, sets: "CandidateSets") -> None:
        """Overwrite these rows with ``sets``, which have at most as many columns."""
        width = sets.ids.shape[1]
        self.counts[rows] = sets.counts
        for name in ("ids", "probs", "mass_left", "base_logits"):
            getattr(self, name)[rows, :width] = getattr(sets, name)
        self.probs[rows, width:] = 0.0

    def widened(self, width: int) -> "CandidateSets":
        """The same sets padded to ``width`` columns."""
        rows, before = self.ids.shape
        wide = CandidateSets.empty(rows, max(width, before))
        wide.put(torch.arange(rows), self)
        return wide

    def __getitem__(self, rows: Tensor) -> "CandidateSets":
        return CandidateSets(*(getattr(self, field.name)[rows] for field in fields(self)))


def candidate_sets(logits: Tensor, rule: CandidateRule) -> CandidateSets:
    """Candidates of next-token ``logits`` (R, V): softmax at temperature 1, top-k, then top-p.

    top-p acts on the mass renormalised after top-k and keeps the token that crosses ``top_p``
    (MARA §3.2). K is min(top_k, V).
    """
    # Only the k best leave the device; log-softmax is monotone, so they are the k best logits.
    top, ids = torch.topk(logits, min(rule.top_k, logits.shape[-1]), dim=-1)
    probs = torch.softmax(top.float().cpu(), -1)
    mass_before = probs.cumsum(-1) - probs
    kept = mass_before < rule.top_p
    kept[:, 0] = True
    probs = torch.where(kept, probs, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    counts = kept.sum(-1)
    mass_left = probs.flip(-1).cumsum(-1).flip(-1)
    after = mass_left[:, 1:].clamp_min(torch.finfo(torch.float32).tiny)
    base_logits = torch.full_like(probs, FORCED_LOGIT)
    base_logits[:, :-1] = probs[:, :-1].clamp_min(1e-38).log() - after.log()
    index = torch.arange(probs.shape[-1])
    base_logits = torch.where(index >= counts[:, None] - 1, FORCED_LOGIT, base_logits)
    return CandidateSets(ids.cpu(), probs, counts, mass_left, base_logits)
