"""Which candidate a rule takes, and when it has seen enough of a set to know."""

from typing import Literal

import torch
from torch import Tensor

from mara_rl.agent import Fallback, Rule

UNDECIDED = -1


def decide(
    rule: Rule,
    accept_logits: Tensor,
    looked: Tensor,
    counts: Tensor,
    *,
    fallback: Fallback | Literal["last"] = "last",
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor:
    """The candidate each of R slots takes (R,), int64; `UNDECIDED` where more must be looked at.

    However many candidates are looked at beyond those needed, the choice is the same as that of
    looking at one at a time.

    Args:
        rule: ``argmax_induced`` takes the argmax of π_k = a_k Π_{j<k} (1 − a_j), known once the
            best π so far is at least the mass left; ``threshold`` the first candidate with
            a_k > 0.5, else the fallback; ``sample`` inverts the cumulative π at ``uniform``.
        accept_logits: accept log-odds (R, W) of each slot's candidates; only the first ``looked``
            of a row are read.
        looked: candidates looked at (R,), at least 1.
        counts: candidates of each slot's set (R,); the last one of a set is always accepted.
        fallback: what ``threshold`` takes when it accepts none.
        uniform: numbers in [0, 1) that ``sample`` inverts (R,), float64.
        temperature: of the induced distribution for ``sample`` (R,), above 0; None means 1.
    """
    width = accept_logits.shape[1]
    index = torch.arange(width)
    seen = index < looked[:, None]
    last = index == counts[:, None] - 1
    complete = looked >= counts
    if rule == "threshold":
        accepted = (accept_logits > 0) & seen
        first = accepted.int().argmax(1)
        none = torch.zeros_like(counts) if fallback == "first" else counts - 1
        rest = torch.where(complete, none, UNDECIDED)
        return torch.where(accepted.any(1), first, rest)
    induced, mass_left = induced_probabilities(accept_logits, seen, last)
    if rule == "argmax_induced":
        best = induced.max(1)
        first = (induced == best.values[:, None]).int().argmax(1)
        return torch.where(complete | (best.values >= mass_left), first, UNDECIDED)
    assert uniform is not None
    if temperature is None:
        weights, rest_low, rest_high = induced, mass_left, mass_left
    else:
        power = 1.0 / temperature[:, None]
        weights = induced**power
        unseen = (counts - looked).clamp_min(1)
        one, spread = mass_left ** power[:, 0], unseen * (mass_left / unseen) ** power[:, 0]
        # Σ x_i^p of unseen x_i that sum to the mass left lies between these two.
        rest_low, rest_high = torch.minimum(one, spread), torch.maximum(one, spread)
        rest_low, rest_high = (torch.where(complete, 0.0, rest) for rest in (rest_low, rest_high))
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1]
    low = (cumulative > (uniform * (total + rest_low))[:, None]) & seen
    high = (cumulative > (uniform * (total + rest_high))[:, None]) & seen
    choice_low, choice_high = low.int().argmax(1), high.int().argmax(1)
    known = low.any(1) & high.any(1) & (choice_low == choice_high)
    # Rounding may leave the cumulative sum of a whole set a little below the total.
    at_end = torch.where(complete, counts - 1, UNDECIDED)
    return torch.where(known, choice_low, at_end)


def induced_probabilities(
    accept_logits: Tensor, seen: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """π (R, W), float64, of the candidates seen, 0 elsewhere; and the mass left (R,).

    π_k = a_k Π_{j<k} (1 − a_j), a_k = 1 for the last candidate of a set.
    """
    accept = torch.sigmoid(accept_logits.double())
    accept = torch.where(last, 1.0, accept)
    accept = torch.where(seen, accept, 0.0)
    after = (1 - accept).cumprod(1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    return accept * before, after[:, -1]
