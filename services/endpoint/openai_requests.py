"""What the API takes: OpenAI's fields that are supported, and `mara`, ours.

A field that is not here is refused. Fields that can be given at a value that asks for nothing are
here with that value alone.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mara_rl.llm.candidates import TopP
from services.http.api_errors import UNSUPPORTED

MIN_TEMPERATURE = 0.01
_MAX_SEED = 2**63 - 1024  # the seeds of further choices follow


def _neutral(value: Any) -> Any:
    if value:
        raise PydanticCustomError(UNSUPPORTED, "not supported by this server; leave it out")
    return value


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a character (an unpaired surrogate)") from error
    return text


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_whole)]
"""JSON may hold half of a character, as programs that cut texts by UTF-16 units write it."""
Zero = Annotated[float, AfterValidator(_neutral), Field(ge=0, le=0)]
No = Annotated[bool, AfterValidator(_neutral), WithJsonSchema({"const": False})]
Nothing = Annotated[
    dict[str, Any] | list[Any],
    AfterValidator(_neutral),
    WithJsonSchema({"type": ["object", "array"], "maxProperties": 0, "maxItems": 0}),
]
NoText = Annotated[str, AfterValidator(_neutral), WithJsonSchema({"const": ""})]
StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=4),
    BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
]
Weights = dict[Text, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]]


class Strict(BaseModel):
    """A part of a request: no unknown fields, and no value taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MaraOptions(Strict):
    """What goes beyond OpenAI: ``extra_body={"mara": {…}}`` of the official client."""

    trace: bool = Field(False, description="tell for every token how it was chosen")
    strength: float = Field(
        1.0, ge=-100, le=100, allow_inf_nan=False, description="scales the agents; 0: the LLM alone"
    )
    blend: Weights | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="agents that act together, by model name, and their weights; `model` names one "
        "of them, or the LLM",
    )
    best_of: int | None = Field(
        None, ge=1, description="answers sampled for each prompt, of which the best `n` are given"
    )
    rank_by: Weights = Field(
        {"reward": 1.0}, min_length=1, description="what is best: Σ weight · score, by score name"
    )
    scores: bool = Field(False, description="give the scores of every answer")


class StreamOptions(Strict):
    """OpenAI's stream options."""

    include_usage: bool = Field(False, description="end with a chunk that holds `usage`")
    include_obfuscation: No | None = None


class TextFormat(Strict):
    """The only response format: plain text."""

    type: Literal["text"]


class _Request(Strict):
    """What both kinds of request have in common."""

    model: str = Field(min_length=1, max_length=256, description="the LLM, or an agent")
    max_tokens: int | None = Field(None, ge=1, description="tokens of an answer at most")
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="0.01 and above: sampled from the induced distribution; 0: its argmax; "
        "left out: the agent's own rule, for the LLM alone argmax",
    )
    top_p: TopP | None = Field(
        None,
        description="an agent's candidates are part of it: its own value, or 1 for no further cut",
    )
    n: int | None = Field(None, ge=1, description="answers to each prompt")
    stop: StopTexts | None = Field(None, description="up to 4 texts that end an answer")
    seed: int | None = Field(
        None, ge=0, le=_MAX_SEED, description="choice i is drawn with seed + i; left out: random"
    )
    stream: bool | None = Field(None, description="send server-sent events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="written to the request log")
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    mara: MaraOptions | None = None

    @field_validator("temperature")
    @classmethod
    def _no_underflow(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"expected 0 or at least {MIN_TEMPERATURE}")
        return temperature

    @property
    def options(self) -> MaraOptions:
        """``mara``, or its defaults."""
        return self.mara or MaraOptions()

    @property
    def num_choices(self) -> int:
        """Answers to give to each prompt."""
        return self.n or 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        best_of = self.options.best_of
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if best_of is not None and best_of < self.num_choices:
            raise ValueError(f"mara.best_of: {best_of} is below n = {self.num_choices}")
        if best_of is not None and self.stream:
            raise ValueError("mara.best_of: not with stream: true")
        if best_of is not None and not self.temperature:
            raise ValueError("mara.best_of: needs a temperature above 0; else all are the same")
        if best_of is None and "rank_by" in self.options.model_fields_set:
            raise ValueError("mara.rank_by: only with mara.best_of, which it ranks")
        return self


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation.

    An answer may be sent back as the official client has it, with fields that hold nothing.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    refusal: NoText | None = None
    annotations: Nothing | None = None
    audio: Nothing | None = None
    function_call: Nothing | None = None
    tool_calls: Nothing | None = None

    @property
    def text(self) -> str:
        """The content, of several parts one after the other."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="OpenAI's newer name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="log π of each token taken")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="and of this many candidates that were looked at"
    )
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = Field(
        None, description="says nothing where there are no tools"
    )
    store: No | None = None

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError(f"the last one is of role {messages[-1].role}, expected user")
        if not messages[-1].text.strip():
            raise ValueError("the last one is empty, expected some text")
        return messages

    @model_validator(mode="after")
    def _chat_fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens: give it or max_completion_tokens, not both")
        return self

    @property
    def length(self) -> tuple[int | None, str]:
        """Tokens asked for, and by which field."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def num_top_logprobs(self) -> int | None:
        """None where no log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Annotated[int, Field(ge=0)]] = Field(
        description="raw text, several of them, or token ids; no chat template is applied"
    )
    logprobs: int | None = Field(
        None, ge=0, le=5, description="log π of each token, and of this many candidates"
    )
    echo: No | None = None
    best_of: int | None = Field(None, ge=1, le=1, description="1; see mara.best_of")
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str | list[str] | list[int]) -> str | list[str] | list[int]:
        if not prompt or any(text == "" for text in prompt):
            raise ValueError("empty, expected some text or tokens")
        return prompt

    @property
    def length(self) -> tuple[int | None, str]:
        """Tokens asked for, and by which field."""
        return self.max_tokens, "max_tokens"

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs
