"""From a request of the API to what the decoder is asked for, checked."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from envs.protocols import Scorer
from mara_rl.agents.agent import Rule
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.common.yaml_settings import Section
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.policy_llm import PolicyLLM
from services.endpoint.agent_catalog import AgentCatalog, ServedAgent
from services.endpoint.decode_loop import DecodeLoop
from services.endpoint.openai_requests import ChatRequest, CompletionRequest
from services.endpoint.token_report import TokenReport
from services.http.api_errors import ApiError, bad_request

COMPLETION_TOKENS = 16  # OpenAI's default; a chat's is what fits


class ApiLimits(Section):
    """What one request, or one key, may ask for."""

    max_answer_tokens: int = Field(
        1024, ge=1, description="tokens of an answer at most; a chat's default where they fit"
    )
    max_answers: int = Field(16, ge=1, description="answers of one request: prompts x n or best_of")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="bytes of a request's body")
    max_concurrent: int = Field(16, ge=1, description="requests of one key at the same time")


@dataclass(frozen=True)
class Backend:
    """What answers: the LLM behind a decode loop, agents by name, perhaps scores."""

    llm_name: str
    """The name that requests call the LLM by."""
    llm: PolicyLLM
    loop: DecodeLoop
    catalog: AgentCatalog
    scorer: Scorer | None
    report: TokenReport
    deployed: int
    """When the endpoint was, in seconds since 1970; the same in all replicas."""


@dataclass(frozen=True)
class DecodePlan:
    """What one request asks of the decoder.

    Attributes:
        version: what answers: the agent's version, versions of a blend, or the LLM.
        requests: for each prompt ``answers_per_prompt`` in a row.
        choices_per_prompt: how many of them are given.
        prompt_tokens: over all prompts.
    """

    version: str
    requests: list[DecodeRequest]
    answers_per_prompt: int
    choices_per_prompt: int
    prompt_tokens: int


async def plan(
    request: ChatRequest | CompletionRequest, backend: Backend, limits: ApiLimits
) -> DecodePlan:
    """Raises ApiError naming the field that does not fit."""
    served, weights = await _agents(request, backend)
    blend = None
    if served:
        with bad_request("mara.blend" if request.options.blend else "mara.strength"):
            agents = [found.agent for found in served]
            blend = Blend.of(agents, weights, request.options.strength)
    elif request.options.strength != 1.0:
        raise ApiError(
            400, "mara.strength: needs an agent as model, or mara.blend", param="mara.strength"
        )
    _check_scores(request, backend.scorer)
    # A long prompt takes a while to become tokens; other requests go on meanwhile.
    prompts, field = await asyncio.to_thread(_prompts, request, backend.llm)
    per_prompt = request.options.best_of or request.num_choices
    most = min(limits.max_answers, backend.loop.num_slots + backend.loop.max_waiting)
    if len(prompts) * per_prompt > most:
        counted = "mara.best_of" if request.options.best_of else "n"
        param = field if len(prompts) > most else counted
        raise ApiError(
            400,
            f"{param}: {len(prompts)} prompts with {per_prompt} answers each; expected at most "
            f"{most} answers in all",
            param=param,
            code="invalid_value",
        )
    seed = secrets.randbits(48) if request.seed is None else request.seed
    requests = []
    for text, ids in prompts:
        length = _answer_tokens(request, len(ids), field, backend.llm, limits)
        for number in range(per_prompt):
            settings = _settings(request, blend, length, seed + number)
            with bad_request(field):
                requests.append(
                    DecodeRequest.of(backend.llm, text, settings, prompt_ids=ids, blend=blend)
                )
    return DecodePlan(
        version="+".join(found.version for found in served) or backend.llm_name,
        requests=requests,
        answers_per_prompt=per_prompt,
        choices_per_prompt=request.num_choices,
        prompt_tokens=sum(len(ids) for _, ids in prompts),
    )


async def _agents(
    request: ChatRequest | CompletionRequest, backend: Backend
) -> tuple[list[ServedAgent], list[float] | None]:
    """The agents that answer, and their weights; none where the LLM does alone."""
    blend, plain = request.options.blend, request.model == backend.llm_name
    if blend is None:
        return ([] if plain else [await find_agent(request.model, backend.catalog)]), None
    if not plain and request.model not in blend:
        raise ApiError(
            400,
            f"mara.blend: {', '.join(blend)} without the model {request.model!r}; expected it "
            "among them, or the LLM as model",
            param="mara.blend",
        )
    return [await find_agent(name, backend.catalog, "mara.blend") for name in blend], list(
        blend.values()
    )


async def find_agent(name: str, catalog: AgentCatalog, param: str = "model") -> ServedAgent:
    """An agent by name. Raises ApiError 404 where there is none, 503 if nobody can say."""
    try:
        found = catalog.loaded(name)
        return found if found is not None else await asyncio.to_thread(catalog.load, name)
    except (DataError, ConfigError) as error:
        raise ApiError(404, str(error), param=param, code="model_not_found") from error
    except RetryableError as error:
        raise ApiError(503, str(error), param=param, code="registry_unavailable") from error


def _check_scores(request: ChatRequest | CompletionRequest, scorer: Scorer | None) -> None:
    options = request.options
    wanted = "mara.best_of" if options.best_of else "mara.scores" if options.scores else None
    if wanted is not None and scorer is None:
        raise ApiError(400, f"{wanted}: this server has no score services", param=wanted)
    if options.best_of and scorer is not None:
        unknown = sorted(options.rank_by.keys() - set(scorer.names))
        if unknown:
            raise ApiError(
                400,
                f"mara.rank_by: unknown scores {', '.join(unknown)}; expected of "
                f"{', '.join(scorer.names)}",
                param="mara.rank_by",
            )


def _prompts(
    request: ChatRequest | CompletionRequest, llm: PolicyLLM
) -> tuple[list[tuple[str, Sequence[int]]], str]:
    """Each prompt as text, which is what is scored, and as tokens; the field it came from."""
    if isinstance(request, ChatRequest):
        turns = [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
            for turn in request.messages
        ]
        with bad_request("messages"):
            return [(turns[-1]["content"], llm.chat_ids(turns))], "messages"
    given = request.prompt
    if isinstance(given, list) and isinstance(given[0], int):
        ids = [token for token in given if isinstance(token, int)]
        vocabulary = llm.model.config.get_text_config().vocab_size
        if max(ids) >= vocabulary:
            raise ApiError(
                400,
                f"prompt: token id {max(ids)}; expected below {vocabulary}",
                param="prompt",
                code="invalid_value",
            )
        return [(llm.text(ids), ids)], "prompt"
    texts = [given] if isinstance(given, str) else [text for text in given if isinstance(text, str)]
    return [(text, llm.tokenizer(text)["input_ids"]) for text in texts], "prompt"


def _answer_tokens(
    request: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    field: str,
    llm: PolicyLLM,
    limits: ApiLimits,
) -> int:
    """Tokens an answer to a prompt of this length may have."""
    if not prompt_tokens:
        raise ApiError(400, f"{field}: no token comes of it", param=field, code="invalid_value")
    (asked, length_field), room = request.length, llm.context_tokens - prompt_tokens
    if asked is not None and asked > limits.max_answer_tokens:
        raise ApiError(
            400,
            f"{length_field}: {asked}; expected at most {limits.max_answer_tokens}",
            param=length_field,
            code="invalid_value",
        )
    if room < (asked or 1):
        raise ApiError(
            400,
            f"{field}: {prompt_tokens} tokens, and {asked or 1} for the answer, exceed the "
            f"context of {llm.context_tokens}",
            param=field,
            code="context_length_exceeded",
        )
    default = COMPLETION_TOKENS if isinstance(request, CompletionRequest) else room
    return asked or min(default, limits.max_answer_tokens, room)


def _settings(
    request: ChatRequest | CompletionRequest, blend: Blend | None, length: int, seed: int
) -> DecodeSettings:
    rule: Rule | None = None
    if request.temperature is not None:
        rule = "sample" if request.temperature else "argmax_induced"
    top_p = request.top_p
    if blend is not None and top_p is not None:
        own = blend.agents[0].spec.top_p
        if top_p not in (own, 1.0):
            raise ApiError(
                400,
                f"top_p: {top_p}; this agent was trained with {own}, which is part of it",
                param="top_p",
                code="invalid_value",
            )
        top_p = None
    return DecodeSettings(
        max_new_tokens=length,
        rule=rule,
        temperature=request.temperature or 1.0,
        seed=seed,
        stop=tuple(request.stop or ()),
        top_p=top_p,
        stream=True,
        trace=request.options.trace or request.num_top_logprobs is not None,
    )
