"""The agent: a small MLP that turns an LLM's hidden state into an accept log-odds."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mara_rl.common.errors import DataError
from mara_rl.common.yaml_settings import Section
from mara_rl.llm.candidates import CandidateRule

Head = Literal["paper", "anchored", "relative", "advantage"]
Rule = Literal["argmax_induced", "threshold", "sample"]
Fallback = Literal["last", "first"]


class AgentKind(Section):
    """How an agent judges candidates and how it decodes."""

    head: Head = Field(description="how the MLP's output becomes an accept log-odds")
    rule: Rule = Field("argmax_induced", description="how a token is chosen when decoding")
    fallback: Fallback = Field("last", description="candidate taken when `threshold` accepts none")
    exact: bool = Field(
        False, description="decode by looking at all candidates: π(t_k) ∝ p_k e^{term_k}"
    )

    @model_validator(mode="after")
    def _exact_is_possible(self) -> Self:
        check_exact(self.head, self.rule, self.exact)
        return self


class AgentSpec(CandidateRule, AgentKind):
    """Everything beside the weights that fixes what an agent does; saved with them."""

    hidden_size: int = Field(gt=0, description="H of the LLM whose hidden states the agent reads")
    llm: str = Field("", description="name of the LLM the agent was trained on")

    @property
    def needs_prefix(self) -> bool:
        """Whether the head also reads the hidden state of the last accepted token."""
        return self.head in ("relative", "advantage")

    def check_llm(self, name: str, hidden_size: int, *, allow_other_llm: bool = False) -> None:
        """Raise DataError unless the agent can (and, by its name, should) be used with an LLM.

        Hub ids and folders are compared by their last part, letter case aside. An agent that does
        not say which LLM it was trained on, as published ones, is let pass.
        """
        if self.hidden_size != hidden_size:
            raise DataError(
                f"agent: hidden size {self.hidden_size}; LLM {name!r} has hidden size {hidden_size}"
            )
        if not allow_other_llm and not same_llm(self.llm, name):
            raise DataError(
                f"agent: trained on LLM {self.llm!r}, used with {name!r}; "
                "expected the same LLM (--allow-other-llm, allow_other_llm=True: use it anyway)"
            )


def check_exact(head: Head, rule: Rule, exact: bool) -> None:
    """Raise ValueError where all candidates cannot be re-weighted."""
    if exact and head == "paper":
        raise ValueError("exact: needs a head that is anchored to the LLM, not 'paper'")
    if exact and rule == "threshold":
        raise ValueError("exact: goes with rule 'argmax_induced' or 'sample', not 'threshold'")


def same_llm(own: str, other: str) -> bool:
    """Whether an agent's LLM is ``other`` by name, or the agent does not say which is its own."""
    names = [text.rstrip("/").rpartition("/")[2].lower() for text in (own, other)]
    return not own or names[0] == names[1]


class AcceptNetwork(nn.Module):
    """LayerNorm(H) → Linear(H, 1024) → ReLU → Linear(1024, 256) → ReLU → Linear(256, outputs).

    With two outputs this is the actor of the published agents (same state-dict keys; output 1 is
    accept). ``forward`` takes hidden states (..., H) of any float dtype and returns (..., outputs)
    in float32.
    """

    def __init__(self, hidden_size: int, outputs: int = 2, *, zero_output: bool = False) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, 1024)
        self.linear2 = nn.Linear(1024, 256)
        self.output_linear = nn.Linear(256, outputs)
        if zero_output:
            nn.init.zeros_(self.output_linear.weight)
            nn.init.zeros_(self.output_linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        z = self.ln(h.float())
        z = torch.relu(self.linear1(z))
        z = torch.relu(self.linear2(z))
        return self.output_linear(z)


class Agent(nn.Module):
    """An `AcceptNetwork` with a head.

    Heads (accept log-odds of candidate k; r_k is the base LLM's own acceptance probability
    p_k / Σ_{j≥k} p_j):

    - ``paper``: MLP(h_k), as published.
    - ``anchored``: logit r_k + MLP(h_k); untrained it samples exactly as the base LLM.
    - ``relative``: logit r_k + g(h_k) − g(h_prefix), one MLP g, h_prefix the hidden state of the
      last accepted token.
    - ``advantage``: logit r_k + q(h_k) − v(h_prefix), q and v the two outputs of one MLP: the
      reward to go with the candidate taken, and before it is. Unlike g, they need not remember
      what earlier tokens have earned.
    """

    def __init__(self, spec: AgentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = AcceptNetwork(spec.hidden_size, zero_output=spec.head != "paper")

    def accept_logit(self, h: Tensor, base_logit: Tensor, h_prefix: Tensor | None = None) -> Tensor:
        """Accept log-odds (...), float32, of candidates with hidden states ``h`` (..., H).

        ``base_logit`` (...) is logit r_k. ``h_prefix`` (..., H) is required by the ``relative``
        and ``advantage`` heads and ignored by the others. Raises ValueError where it is required
        and missing.
        """
        term = self.terms(h)[0]
        if self.spec.head == "paper":
            return term
        if self.spec.needs_prefix:
            if h_prefix is None:
                raise ValueError(f"head {self.spec.head!r} needs h_prefix, the last token's state")
            term = term - self.terms(h_prefix)[1]
        return base_logit.float() + term

    def terms(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own log-odds of hidden states (..., H), both (...), float32.

        The first is a candidate's; the second is taken off those of the candidates that follow,
        once it is the last accepted token (0 for heads that do not read the prefix).
        """
        logits = self.network(h)
        if self.spec.head == "advantage":
            return logits[..., 1], logits[..., 0]
        own = logits[..., 1] - logits[..., 0]
        return own, own if self.spec.needs_prefix else torch.zeros_like(own)
