"""One request while it is decoded: what was asked, what has been answered, what comes next."""

import numpy as np
import torch
from torch import Tensor

from mara_rl.decoding.answer import CandidateStates, DecodedAnswer, FinishReason
from mara_rl.decoding.request import DecodeRequest
from mara_rl.decoding.rules import UNDECIDED
from mara_rl.decoding.text_stream import TextStream
from mara_rl.llm.policy_llm import PolicyLLM


class RunningSequence:
    """A request that has, or waits for, a slot.

    Attributes:
        choice: the candidate taken of the open set, or `UNDECIDED`.
        unseen: whether it was taken without a look.
        used: places of the engine used since the answer last grew.
        leader: the candidate most likely to be taken, while undecided.
        follows: the leader whose followers are being looked at.
        ended: why the answer is complete; "" while it is not.
        states: hidden states to keep, or None.
        candidates: (position, probabilities (K), hidden states (K, H)) to keep, or None.
        seen: accept log-odds (K,) of the open set, for the trace.
    """

    def __init__(self, request: DecodeRequest, llm: PolicyLLM) -> None:
        settings = request.settings
        self.request = request
        self.blend = request.blend
        self.answer = DecodedAnswer(request.prompt, trace=[] if settings.trace else None)
        self.choice = UNDECIDED
        self.unseen = False
        self.used = 0
        self.leader: int | None = None
        self.follows: int | None = None
        self.ended: FinishReason = ""
        self.states: list[Tensor] | None = [] if settings.keep_states else None
        self.candidates: list[tuple[int, Tensor, Tensor]] | None = (
            [] if settings.keep_candidates else None
        )
        self.seen: Tensor | None = None
        self._llm = llm
        self._rng = np.random.default_rng(settings.seed)
        self._stream = TextStream(llm, settings.stop) if settings.stream or settings.stop else None

    def draw(self) -> float:
        """The number that the next token is drawn with."""
        return float(self._rng.random()) if self.request.rule == "sample" else 0.0

    def next_of_opening(self) -> int | None:
        """None where there is no opening, it is over, or the answer has left it."""
        opening, begun = self.request.opening_ids, self.answer.token_ids
        on_it = len(begun) < len(opening) and list(opening[: len(begun)]) == begun
        return opening[len(begun)] if on_it else None

    def grow(self, token_id: int) -> str:
        """Append a token; the text that is certain now."""
        ids = self.answer.token_ids
        ids.append(token_id)
        piece = self._stream.push(token_id) if self._stream else ""
        if token_id in self._llm.eos_ids or (self._stream and self._stream.stopped):
            self.ended = "stop"
        elif len(ids) >= self.request.settings.max_new_tokens:
            self.ended = "length"
        if self.ended and self._stream:
            piece += self._stream.finish()
            if self._stream.stopped:
                self.ended = "stop"
        return piece

    def end(self, reason: FinishReason) -> None:
        """Complete the answer."""
        answer = self.answer
        answer.finish_reason = reason
        answer.text = self._stream.text if self._stream else self._llm.text(answer.token_ids)
        if self.states:
            answer.states = torch.stack(self.states)
        if self.candidates:
            positions, probs, states = zip(*self.candidates, strict=True)
            answer.candidates = CandidateStates(
                positions=torch.tensor(positions),
                counts=torch.tensor([len(part) for part in probs]),
                probs=torch.cat(probs),
                states=torch.cat(states),
            )

    def keep(self, state: Tensor) -> None:
        """Keep a hidden state (H), where asked for."""
        if self.states is not None:
            self.states.append(_half(state))

    def keep_candidates(self, probs: Tensor, states: Tensor) -> None:
        """Keep the next token's candidates, (K) and (K, H), where asked for."""
        if self.candidates is not None:
            position = len(self.answer.token_ids)
            self.candidates.append((position, probs.float().clone(), _half(states)))


def _half(states: Tensor) -> Tensor:
    """As float16 on the CPU. bfloat16 reaches further: large states are clipped."""
    limit = torch.finfo(torch.float16).max
    return states.float().clamp(-limit, limit).half().cpu()
