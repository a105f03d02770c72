"""What the API gives: OpenAI's answers, with `mara` beside a choice where it was asked for."""

from typing import Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """Tokens. All answers of `mara.best_of` count, those not given too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A candidate; ``bytes`` is None where the token is no whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token taken."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """log π of the tokens of a chat answer."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """log π of the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TracedCandidate(BaseModel):
    """A candidate for one token.

    ``accept_prob`` (a_k) and ``induced_prob`` (π_k) are None where it was not looked at, or where
    there is no agent.
    """

    token: str
    llm_prob: float
    accept_prob: float | None
    induced_prob: float | None


class TracedToken(BaseModel):
    """How a token was chosen: candidate ``choice`` of ``num_candidates``, the first of which are
    listed. ``text`` is what the answer grew by, which may come later than its token."""

    token: str
    text: str
    choice: int
    num_candidates: int
    candidates: list[TracedCandidate]


class MaraPart(BaseModel):
    """Beside a choice, where the request has `mara`.

    ``kl``: nats, over the answer; ``examined``, ``looked``: candidates; ``scores``: None where a
    score could not be had, ``scores_error`` says why.
    """

    trace: list[TracedToken] | None = None
    examined: int | None = None
    looked: int | None = None
    kl: float | None = None
    scores: dict[str, float | None] | None = None
    scores_error: str | None = None


FinishReason = Literal["stop", "length"]


class AssistantMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat request."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    mara: MaraPart | None = None


class ChatCompletion(BaseModel):
    """All answers to a chat request. ``system_fingerprint``: the agent's version that answered."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What an answer grew by."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """One answer's growth."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    mara: MaraPart | None = None


class ChatChunk(BaseModel):
    """One server-sent event of a chat answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    """One completion, or in a stream what it grew by."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    mara: MaraPart | None = None


class TextCompletion(BaseModel):
    """All completions, or one server-sent event of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A name that `model` may take. ``root``: the version it stands for at this moment."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970")
    owned_by: str = "mara-rl"
    root: str
    kind: Literal["llm", "agent"]


class ModelList(BaseModel):
    """All names that `model` may take."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
