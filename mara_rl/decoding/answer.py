"""What a decoder gives back: answers, how they grow, and why each token was taken."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["", "stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class CandidateTrace:
    """A candidate: its probability under the LLM, and what its agents made of it.

    ``accept_prob`` (a_k) and ``induced_prob`` (π_k) are None where it was not looked at.
    """

    token_id: int
    llm_prob: float
    accept_prob: float | None
    induced_prob: float | None


@dataclass(frozen=True)
class TokenTrace:
    """How one token was chosen: the set of candidates and the index taken."""

    candidates: list[CandidateTrace]
    choice: int


@dataclass(frozen=True)
class CandidateStates:
    """All candidates of an answer's P positions that had more than one; N candidates together.

    Attributes:
        positions: which tokens of the answer (P,), int64.
        counts: candidates of each (P,), int64; they sum to N.
        probs: the LLM's probabilities of these candidates (N,), float32.
        states: their hidden states (N, H), float16, CPU.
    """

    positions: Tensor
    counts: Tensor
    probs: Tensor
    states: Tensor


@dataclass
class DecodedAnswer:
    """One answer, complete once ``finish_reason`` is set.

    Attributes:
        prompt: the prompt answered.
        text: the answer, special tokens left out, cut before a stop text; complete at the end.
        token_ids: its tokens, an end-of-turn token included.
        choices: index of each token in its position's candidates: 0 is the LLM's first choice.
        finish_reason: "stop" (an end token or stop text), "length", "cancelled", or "failed" where
            the LLM's hidden state was not finite.
        examined: candidates that looking at one after the other would have needed.
        looked: candidates put through the LLM for it.
        kl: Σ KL(a_k ‖ r_k) over the decisions up to each token taken, in nats; with rule ``sample``
            at temperature 1 an unbiased estimate of the answer's KL to the truncated base LLM.
            0 without an agent.
        states: hidden states (T + 1, H) before each token and after the last, float16, CPU; only
            where asked for.
        candidates: all candidates of the positions that left a choice; only where asked for.
        trace: one entry a token; only where asked for.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    finish_reason: FinishReason = ""
    examined: int = 0
    looked: int = 0
    kl: float = 0.0
    states: Tensor | None = None
    candidates: CandidateStates | None = None
    trace: list[TokenTrace] | None = None


@dataclass(frozen=True)
class Growth:
    """What one step added to an answer.

    ``token_id`` is None where the answer failed; ``text`` is what is certain now, for requests that
    stream.
    """

    answer: DecodedAnswer
    token_id: int | None
    text: str
