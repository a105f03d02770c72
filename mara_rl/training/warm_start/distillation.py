"""Distillation: what an agent would choose among all candidates, as decisions about one at a time.

With terms t_k fitted to values, π*_k ∝ p_k e^{t_k} is the optimum of reward − β·KL, but it weighs
all candidates against each other (the ``exact`` rule). The chain of accept/reject decisions sees
one candidate and the prefix, and the mean value of the prefix is not what makes it choose alike: a
candidate must be compared with the best of those after it. So the network is fitted to that choice
itself, on sets of candidates all of which were looked at.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mara_rl.agents.agent import Agent
from mara_rl.common.errors import DataError
from mara_rl.common.network_fit import fit_network
from mara_rl.decoding.answer import CandidateStates
from mara_rl.training.warm_start.token_credit import SampledAnswer

_BATCH_SETS = 256
_LR = 3e-4


def distil(
    agent: Agent,
    answers: Sequence[SampledAnswer],
    *,
    epochs: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """Fit the agent's network so that its chain induces its own π*; KL(π* ‖ π) before and after.

    Both are means over the sets of a tenth of the prompts, which are not fitted, in nats.
    ``answers``: those without candidates are passed over; ``progress`` is told of every epoch.
    Raises DataError where no answer has candidates.
    """
    generator = torch.Generator().manual_seed(seed)
    known = [(a, a.candidates) for a in answers if a.candidates is not None]
    if not known:
        raise DataError("warm_start: no answer had a choice of candidates to distil from")
    sets = _CandidateSets.of(known)
    target = sets.wanted(agent)
    prompts = sorted({a.prompt for a, _ in known})
    order = torch.randperm(len(prompts), generator=generator).tolist()
    kept_out = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    held_out = torch.cat(
        [torch.full_like(c.positions, a.prompt in kept_out, dtype=torch.bool) for a, c in known]
    )
    fitted = (~held_out).nonzero()[:, 0]

    def divergence() -> float:
        with torch.no_grad():
            rows = held_out.nonzero()[:, 0]
            return sets.divergence(agent, target, rows).mean().item()

    before = divergence()

    def losses() -> Iterator[Tensor]:
        for chosen in torch.randperm(len(fitted), generator=generator).split(_BATCH_SETS):
            yield sets.divergence(agent, target, fitted[chosen]).mean()

    fit_network(
        agent.network.parameters(),
        losses,
        name="warm_start: the distillation",
        epochs=epochs,
        cycle_batches=math.ceil(len(fitted) / _BATCH_SETS),
        lr=_LR,
        progress=progress,
    )
    return before, divergence()


@dataclass(frozen=True)
class _CandidateSets:
    """S sets of candidates, padded to K: hidden states of the prefix (S, H) and of N candidates.

    ``rows`` (S, K): where each candidate's state lies; ``there`` (S, K): whether there is one.
    """

    prefix: Tensor
    states: Tensor
    probs: Tensor
    rows: Tensor
    there: Tensor

    @classmethod
    def of(cls, known: Sequence[tuple[SampledAnswer, CandidateStates]]) -> "_CandidateSets":
        counts = torch.cat([c.counts for _, c in known])
        index = torch.arange(int(counts.max()))
        there = index < counts[:, None]
        rows = (counts.cumsum(0) - counts)[:, None] + index
        rows = torch.where(there, rows, 0)
        probs = torch.cat([c.probs for _, c in known])[rows]
        return cls(
            prefix=torch.cat([a.states[c.positions] for a, c in known]),
            states=torch.cat([c.states for _, c in known]),
            probs=torch.where(there, probs, 0.0),
            rows=rows,
            there=there,
        )

    @torch.no_grad()
    def wanted(self, agent: Agent) -> Tensor:
        """log π* (S, K), −∞ where there is no candidate."""
        terms = torch.cat([agent.terms(part)[0] for part in self.states.split(8192)])
        weights = self.probs.log() + terms[self.rows]
        return weights.masked_fill(~self.there, -torch.inf).log_softmax(1)

    def divergence(self, agent: Agent, target: Tensor, chosen: Tensor) -> Tensor:
        """KL(π* ‖ π), nats, of the chosen sets (R,); π what the agent's decisions induce."""
        there, probs, wanted = self.there[chosen], self.probs[chosen], target[chosen]
        own = probs.new_zeros(there.shape)
        own[there] = agent.terms(self.states[self.rows[chosen][there]])[0]
        taken_off = agent.terms(self.prefix[chosen])[1]
        after = probs.flip(1).cumsum(1).flip(1) - probs
        logits = (probs.log() - after.log()).nan_to_num(0.0) + own - taken_off[:, None]
        last = there & ~torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1)
        accept = torch.where(last, 0.0, logsigmoid(logits))
        reject = torch.where(last | ~there, 0.0, logsigmoid(-logits))
        induced = accept + reject.cumsum(1) - reject
        return torch.where(there, wanted.exp() * (wanted - induced), 0.0).sum(1)
