"""Which candidate a rule takes, and when it has seen enough of a set to know."""

from typing import NamedTuple

import torch
from torch import Tensor

from mara_rl.agents.agent import Fallback, Rule
from mara_rl.llm.candidates import FORCED_LOGIT

UNDECIDED = -1


class Decision(NamedTuple):
    """What R slots decide.

    Attributes:
        choice: the candidate taken (R,), int64; `UNDECIDED` where more must be looked at.
        examined: candidates that looking at one after the other would have needed (R,), int64;
            meaningless where undecided.
        leader: the candidate most likely to be taken where undecided (R,), int64; None where
            those looked at are out of the running.
    """

    choice: Tensor
    examined: Tensor
    leader: Tensor | None = None


def decide(
    rule: Rule,
    accept_logits: Tensor,
    looked: Tensor,
    counts: Tensor,
    *,
    fallback: Fallback = "last",
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Decision:
    """Which candidate each of R slots takes, where that is known.

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

    Raises ValueError for ``sample`` without ``uniform``.
    """
    index = torch.arange(accept_logits.shape[1])
    seen = index < looked[:, None]
    complete = looked >= counts
    if rule == "threshold":
        accepted = (accept_logits > 0) & seen
        first = accepted.int().argmax(1)
        found = accepted.any(1)
        none = torch.zeros_like(counts) if fallback == "first" else counts - 1
        choice = torch.where(found, first, torch.where(complete, none, UNDECIDED))
        return Decision(choice, torch.where(found, first + 1, counts))
    induced, left = induced_probabilities(accept_logits, seen, index == counts[:, None] - 1)
    if rule == "argmax_induced":
        settled = induced.cummax(1).values >= left
        known = settled.any(1) | complete
        examined = torch.where(settled.any(1), settled.int().argmax(1) + 1, counts)
        best = induced.argmax(1)
        return Decision(torch.where(known, best, UNDECIDED), examined, best)
    if uniform is None:
        raise ValueError("rule 'sample' needs uniform, the numbers it inverts π at")
    choice = _sampled(induced, left[:, -1], looked, counts, uniform, temperature)
    return Decision(choice, choice + 1)


def _sampled(
    induced: Tensor,
    mass_left: Tensor,
    looked: Tensor,
    counts: Tensor,
    uniform: Tensor,
    temperature: Tensor | None,
) -> Tensor:
    """Where the cumulative tempered distribution passes ``uniform`` (R,), if that is certain."""
    complete = looked >= counts
    if temperature is None:
        weights, low_rest, high_rest = induced, mass_left, mass_left
    else:
        power = 1.0 / temperature[:, None]
        weights = induced**power
        unseen = (counts - looked).clamp_min(1)
        one, spread = mass_left ** power[:, 0], unseen * (mass_left / unseen) ** power[:, 0]
        # Σ x_i^p of unseen x_i that sum to the mass left lies between these two.
        low_rest, high_rest = torch.minimum(one, spread), torch.maximum(one, spread)
        low_rest, high_rest = (torch.where(complete, 0.0, rest) for rest in (low_rest, high_rest))
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1]
    seen = torch.arange(induced.shape[1]) < looked[:, None]
    low = (cumulative > (uniform * (total + low_rest))[:, None]) & seen
    high = (cumulative > (uniform * (total + high_rest))[:, None]) & seen
    choice_low, choice_high = low.int().argmax(1), high.int().argmax(1)
    known = low.any(1) & high.any(1) & (choice_low == choice_high)
    # Rounding may leave the cumulative sum of a whole set a little below the total.
    return torch.where(known, choice_low, torch.where(complete, counts - 1, UNDECIDED))


def induced_probabilities(
    accept_logits: Tensor, seen: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """π (R, W), float64, 0 where not seen; and the mass left after each candidate (R, W).

    π_k = a_k Π_{j<k} (1 − a_j), a_k = 1 for the last candidate of a set.
    """
    accept = torch.sigmoid(accept_logits.double())
    accept = torch.where(last, 1.0, accept)
    accept = torch.where(seen, accept, 0.0)
    after = (1 - accept).cumprod(1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    return accept * before, after


def reweighted_logits(probs: Tensor, terms: Tensor) -> Tensor:
    """Accept log-odds (R, K), float32, that induce π_k = p_k e^{t_k} / Σ_j p_j e^{t_j}.

    The value re-weighted ("exact") rule: a_k = p_k e^{t_k} / Σ_{j≥k} p_j e^{t_j}. ``probs`` (R, K)
    are 0 past the end of a set, and what stands there in the result is without meaning.
    """
    weights = probs.double().log() + terms.double()  # −∞ past the end
    rest = weights.flip(1).logcumsumexp(1).flip(1)
    after = torch.cat([rest[:, 1:], torch.full_like(rest[:, :1], -torch.inf)], dim=1)
    return (weights - after).nan_to_num(nan=0.0, posinf=FORCED_LOGIT).float()


def sampled_index(probs: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """The index at which the cumulative ``probs`` (K,), tempered, pass ``uniform`` in [0, 1)."""
    weights = probs.double() ** (1.0 / temperature)
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_max(
        int((probs > 0).sum()) - 1
    )


def bernoulli_kl(logit_a: Tensor, logit_r: Tensor) -> Tensor:
    """KL(Bernoulli(σ(logit_a)) ‖ Bernoulli(σ(logit_r))) in nats, elementwise."""
    a = torch.sigmoid(logit_a)
    accept = torch.nn.functional.logsigmoid(logit_a) - torch.nn.functional.logsigmoid(logit_r)
    reject = torch.nn.functional.logsigmoid(-logit_a) - torch.nn.functional.logsigmoid(-logit_r)
    return a * accept + (1 - a) * reject
