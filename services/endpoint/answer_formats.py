"""Answers in the two shapes of OpenAI's API, whole or as chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel

from services.endpoint.decode_loop import GrownToken
from services.endpoint.openai_answers import (
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
from services.endpoint.token_report import TokenReport

Mara = dict[str, MaraPart]
"""``{"mara": …}`` where the request asks for it, else empty: a field not set is not sent."""


class AnswerFormat(ABC):
    """One request's answers. A chunk is about one choice, but for the last, which holds usage."""

    id_prefix: ClassVar[str]

    def __init__(self, model: str, version: str, report: TokenReport, top: int | None) -> None:
        """``top``: how many candidates' log π to give with each token's; None gives neither."""
        self._report = report
        self._top = top
        self._head = {  # what all chunks of one answer have in common
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
        }

    @abstractmethod
    def opening(self, index: int) -> BaseModel | None:
        """The chunk that a choice begins with, if there is one."""

    @abstractmethod
    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> BaseModel:
        """The chunk of tokens that a choice grew by."""

    @abstractmethod
    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> BaseModel:
        """The chunk that a choice ends with."""

    @abstractmethod
    def usage(self, usage: Usage) -> BaseModel:
        """The chunk that a stream ends with, where it is asked for."""

    @abstractmethod
    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason | None,
        mara: Mara,
    ) -> BaseModel:
        """A choice with all its tokens, for `whole`."""

    @abstractmethod
    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> BaseModel:
        """The answer where none is streamed: all that `choice` gave."""


class ChatFormat(AnswerFormat):
    """``chat.completion`` and ``chat.completion.chunk``."""

    id_prefix = "chatcmpl"

    def opening(self, index: int) -> ChatChunk:
        return self._chunk(index, Delta(role="assistant", content=""), (), None, {})

    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> ChatChunk:
        delta = Delta(content="".join(token.text for token in tokens))
        return self._chunk(index, delta, tokens, None, mara)

    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> ChatChunk:
        return self._chunk(index, Delta(), (), finish_reason, mara)

    def usage(self, usage: Usage) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason | None,
        mara: Mara,
    ) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=text, refusal=None),
            logprobs=self._logprobs(tokens),
            finish_reason=finish_reason,
            **mara,
        )

    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            object="chat.completion", choices=list(choices), usage=usage, **self._head
        )

    def _chunk(
        self,
        index: int,
        delta: Delta,
        tokens: Sequence[GrownToken],
        finish_reason: FinishReason | None,
        mara: Mara,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(tokens),
            finish_reason=finish_reason,
            **mara,
        )
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self._head)

    def _logprobs(self, tokens: Sequence[GrownToken]) -> ChatLogprobs | None:
        if self._top is None or not tokens:
            return None
        return ChatLogprobs(content=self._report.chat_logprobs(tokens, self._top))


class TextFormat(AnswerFormat):
    """``text_completion``, which is also what the chunks of a stream are called."""

    id_prefix = "cmpl"

    def __init__(self, model: str, version: str, report: TokenReport, top: int | None) -> None:
        super().__init__(model, version, report, top)
        self._characters: dict[int, int] = {}  # of text given so far, by choice

    def opening(self, index: int) -> None:
        return None

    def growth(self, index: int, tokens: Sequence[GrownToken], mara: Mara) -> TextCompletion:
        text = "".join(token.text for token in tokens)
        return self._completion([self.choice(index, text, tokens, None, mara)])

    def end(self, index: int, finish_reason: FinishReason, mara: Mara) -> TextCompletion:
        return self._completion([self.choice(index, "", (), finish_reason, mara)])

    def usage(self, usage: Usage) -> TextCompletion:
        return self._completion([], usage=usage)

    def choice(
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
        if self._top is not None and tokens:
            logprobs = self._report.text_logprobs(tokens, self._top, offset)
        return TextChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason, **mara
        )

    def whole(self, choices: Sequence[BaseModel], usage: Usage) -> TextCompletion:
        return self._completion(choices, usage=usage)

    def _completion(self, choices: Sequence[BaseModel], **usage: Usage) -> TextCompletion:
        return TextCompletion(
            object="text_completion", choices=list(choices), **usage, **self._head
        )
