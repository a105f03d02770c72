"""Agents that act together on one sequence, each with a weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_rl.agents.agent import Agent
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.llm.candidates import CandidateRule


@dataclass(frozen=True, eq=False)
class Blend:
    """Accept log-odds = logit r_k + Σ_i w_i · term_i, term_i that of agent i's head.

    All weights 0 leave the base LLM; one agent with weight 1 is that agent as trained. A weight is
    an agent's share times the strength asked for; above 1 and below 0 are allowed. An agent with
    the ``paper`` head is not anchored to the LLM: it acts alone, with weight 1.

    Attributes:
        agents: at least one, all of one hidden size and the same candidates.
        weights: w_i, finite.
    """

    agents: tuple[Agent, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls, agents: Sequence[Agent], weights: Sequence[float] | None = None, strength: float = 1.0
    ) -> "Blend":
        """A blend of ``agents``, with equal weights that sum to 1 unless given.

        Raises ConfigError naming the setting that does not fit, DataError agents that do not.
        """
        shares = [1.0 / len(agents)] * len(agents) if weights is None else list(weights)
        if len(shares) != len(agents):
            raise ConfigError(f"weights: {len(shares)} for {len(agents)} agents; expected one each")
        scaled = tuple(strength * share for share in shares)
        if not all(abs(weight) < float("inf") for weight in scaled):
            raise ConfigError(f"strength {strength}, weights {shares}: expected finite numbers")
        specs = [agent.spec for agent in agents]
        for field in ("hidden_size", *CandidateRule.model_fields):
            found = sorted({getattr(spec, field) for spec in specs})
            if len(found) > 1:
                raise DataError(f"agents of a blend differ in {field}: {found}; expected one value")
        if any(spec.head == "paper" for spec in specs) and scaled != (1.0,):
            raise ConfigError(
                "strength, weights: an agent with head 'paper' is not anchored to the LLM and "
                "acts alone at strength 1; expected agents with another head"
            )
        return cls(tuple(agents), scaled)

    @property
    def anchored(self) -> bool:
        """Whether logit r_k is part of the accept log-odds."""
        return self.agents[0].spec.head != "paper"


@torch.inference_mode()
def blended_terms(blends: Sequence[Blend | None], counts: Tensor, h: Tensor) -> Tensor:
    """What each row's agents say of its hidden states: (N, 2), float32, CPU; 0 without agents.

    ``h`` (N, H) holds ``counts`` (R,) states for each of R ``blends``. Column 0 is
    Σ w_i · term_i, column 1 what is taken off for a last token of this state; see `Agent.terms`.
    Each agent's network runs once, over all rows that have it.
    """
    shares: dict[Agent, list[float]] = {}
    for row, blend in enumerate(blends):
        if blend is None:
            continue
        for agent, weight in zip(blend.agents, blend.weights, strict=True):
            shares.setdefault(agent, [0.0] * len(blends))[row] += weight
    terms = torch.zeros(len(h), 2)
    for agent, weights in shares.items():
        of_state = torch.tensor(weights).repeat_interleave(counts)
        rows = of_state.nonzero()[:, 0]
        if not len(rows):
            continue
        everywhere = len(rows) == len(h)
        both = agent.terms(h if everywhere else h[rows.to(h.device)])
        terms[rows] += of_state[rows, None] * torch.stack(both, dim=1).cpu()
    return terms
