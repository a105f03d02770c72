"""Answers in the two shapes of OpenAI's API, whole or as chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from services.decode_loop import GrownToken
from services.openai_answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FinishReason,
    MaraPart,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from services.token_report import TokenReport

Mara = dict[str, MaraPart]
"""``{"mara": …}`` where the request asks for it, else empty: a field not set is not sent."""


class AnswerFormat(Protocol):
    """One request's answers. A chunk is about one choice, but for the last, which holds usage."""

    def opening(self, index: int) -> BaseModel | None:
        """The chunk that a choice begins with, if there is one."""
        ...

    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> BaseModel: ...

    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> BaseModel: ...

    def usage(self, usage: Usage) -> BaseModel: ...

    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> BaseModel:
        """All that `choice` gave."""
        ...

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason,
        mara: Mara,
    ) -> BaseModel: ...


class ChatFormat:
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(self, model: str, version: str, report: TokenReport, top: int | None) -> None:
        """``top``: how many candidates' log π to give with each token's; None gives neither."""
        self._head = _head("chatcmpl", model, version)
        self._report = report
        self._top = top

    def opening(self, index: int) -> ChatChunk:
        return self._chunk(index, Delta(role="assistant", content=""), None, None, {})

    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> ChatChunk:
        delta = Delta(content="".join(token.text for token in tokens))
        return self._chunk(index, delta, self._logprobs(tokens), None, mara)

    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> ChatChunk:
        return self._chunk(index, Delta(), None, finish_reason, mara)

    def usage(self, usage: Usage) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            object="chat.completion",
            choices=list(choices),
            usage=usage,
            **self._head,
        )

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason,
        mara: Mara,
    ) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=text, refusal=None),
            logprobs=self._logprobs(tokens),
            finish_reason=finish_reason,
            **mara,
        )

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None,
        finish_reason: FinishReason | None,
        mara: Mara,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason, **mara
        )
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self._head)

    def _logprobs(self, tokens: Sequence[GrownToken]) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return ChatLogprobs(content=self._report.chat_logprobs(tokens, self._top))


class TextFormat:
    """``text_completion``, which is also what the chunks of a stream are called."""

    def __init__(self, model: str, version: str, report: TokenReport, top: int | None) -> None:
        self._head = _head("cmpl", model, version)
        self._report = report
        self._top = top
        self._characters: dict[int, int] = {}  # of text given so far, by choice

    def opening(self, index: int) -> None:
        return None

    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> TextCompletion:
        text = "".join(token.text for token in tokens)
        return self._completion([self._choice(index, text, tokens, None, mara)])

    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> TextCompletion:
        choice = TextChoice(
            index=index, text="", logprobs=None, finish_reason=finish_reason, **mara
        )
        return self._completion([choice])

    def usage(self, usage: Usage) -> TextCompletion:
        return self._completion([], usage=usage)

    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> TextCompletion:
        return self._completion(choices, usage=usage)

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason,
        mara: Mara,
    ) -> TextChoice:
        return self._choice(index, text, tokens, finish_reason, mara)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason | None,
        mara: Mara,
    ) -> TextChoice:
        logprobs: TextLogprobs | None = None
        offset = self._characters.get(index, 0)
        self._characters[index] = offset + len(text)
        if self._top is not None:
            logprobs = self._report.text_logprobs(tokens, self._top, offset)
        return TextChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason, **mara
        )

    def _completion(self, choices: Sequence[BaseModel], **usage: Usage) -> TextCompletion:
        return TextCompletion(
            object="text_completion",
            choices=list(choices),
            **usage,
            **self._head,
        )


def _head(kind: str, model: str, version: str) -> dict[str, Any]:
    """What all chunks of one answer have in common."""
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": version,
    }
