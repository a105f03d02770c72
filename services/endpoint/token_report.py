"""What is told of single tokens: their text, log π, and how they were chosen."""

import math
from collections.abc import Sequence

from mara_rl.decoding.answer import CandidateTrace, TokenTrace
from mara_rl.llm.policy_llm import PolicyLLM
from services.endpoint.decode_loop import GrownToken
from services.endpoint.openai_answers import (
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    TracedCandidate,
    TracedToken,
)

TRACED_CANDIDATES = 10
_NEVER = -9999.0  # log 0, as OpenAI writes it
_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # begins a word in sentencepiece vocabularies


class TokenReport:
    """Tells of the tokens of one LLM."""

    def __init__(self, llm: PolicyLLM) -> None:
        self._tokenizer = llm.tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """A token by itself, special tokens by name, a leading space kept."""
        found = self._texts.get(token_id)
        if found is None:
            found = self._tokenizer.decode([token_id])
            raw = self._tokenizer.convert_ids_to_tokens(token_id)
            if raw.startswith(_SPACE) and not found.startswith(" "):
                found = f" {found}"
            self._texts[token_id] = found
        return found

    def chat_logprobs(self, tokens: Sequence[GrownToken], top: int) -> list[TokenLogprob]:
        """log π of each token and of the ``top`` likeliest candidates that were looked at."""
        content = []
        for token in tokens:
            trace = _traced(token)
            taken = self._logprob(trace, trace.candidates[trace.choice])
            listed = [self._logprob(trace, candidate) for candidate in _likeliest(trace, top)]
            content.append(TokenLogprob(**taken.model_dump(), top_logprobs=listed))
        return content

    def text_logprobs(self, tokens: Sequence[GrownToken], top: int, offset: int) -> TextLogprobs:
        """The same in the shape of completions; ``offset`` characters of text came before."""
        logprobs = TextLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if top else None, text_offset=[]
        )
        for token, entry in zip(tokens, self.chat_logprobs(tokens, top), strict=True):
            logprobs.tokens.append(entry.token)
            logprobs.token_logprobs.append(entry.logprob)
            logprobs.text_offset.append(offset)
            offset += len(token.text)
            if logprobs.top_logprobs is not None:
                logprobs.top_logprobs.append(
                    {candidate.token: candidate.logprob for candidate in entry.top_logprobs}
                )
        return logprobs

    def trace(self, token: GrownToken) -> TracedToken:
        """How a token was chosen, over the first candidates and the one taken."""
        trace = _traced(token)
        shown = max(TRACED_CANDIDATES, trace.choice + 1)
        return TracedToken(
            token=self.text(token.token_id),
            text=token.text,
            choice=trace.choice,
            num_candidates=len(trace.candidates),
            candidates=[
                TracedCandidate(
                    token=self.text(candidate.token_id),
                    llm_prob=round(candidate.llm_prob, 5),
                    accept_prob=_rounded(candidate.accept_prob),
                    induced_prob=_rounded(candidate.induced_prob),
                )
                for candidate in trace.candidates[:shown]
            ],
        )

    def _logprob(self, trace: TokenTrace, candidate: CandidateTrace) -> TopLogprob:
        probability, text = _induced(trace, candidate), self.text(candidate.token_id)
        return TopLogprob(
            token=text,
            logprob=math.log(probability) if probability else _NEVER,
            bytes=None if _PARTIAL in text else list(text.encode()),
        )


def _traced(token: GrownToken) -> TokenTrace:
    assert token.trace is not None, "the plan asks for a trace wherever it is told of"
    return token.trace


def _induced(trace: TokenTrace, candidate: CandidateTrace) -> float | None:
    """π of a candidate; None where it was not looked at. The LLM's own without an agent, or where
    there was nothing to choose."""
    if trace.candidates[trace.choice].induced_prob is None:
        return candidate.llm_prob
    return candidate.induced_prob


def _likeliest(trace: TokenTrace, top: int) -> list[CandidateTrace]:
    known = [(_induced(trace, candidate), candidate) for candidate in trace.candidates]
    looked = [(probability, candidate) for probability, candidate in known if probability]
    return [candidate for _, candidate in sorted(looked, key=lambda pair: -pair[0])[:top]]


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 5)
