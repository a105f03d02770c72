"""One planned request from the decode loop to its answers, whole or streamed."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from typing import cast

from pydantic import BaseModel

from mara_rl.common.errors import ConfigError, DataError, RetryableError, first_line
from mara_rl.decoding.answer import DecodedAnswer
from services.endpoint.answer_formats import AnswerFormat, Mara
from services.endpoint.decode_loop import AnswerGrowth, GrownToken, LoopStoppedError, QueueFullError
from services.endpoint.decode_plan import Backend, DecodePlan
from services.endpoint.endpoint_metrics import EndpointMetrics
from services.endpoint.openai_answers import FinishReason, MaraPart, Usage
from services.endpoint.openai_requests import MaraOptions
from services.endpoint.request_record import RequestRecord
from services.http.api_errors import ApiError


class Answering:
    """The answers of one request; `cancel` frees what they hold, however they end."""

    def __init__(
        self,
        plan: DecodePlan,
        options: MaraOptions | None,
        backend: Backend,
        form: AnswerFormat,
        metrics: EndpointMetrics,
        record: RequestRecord,
    ) -> None:
        """Submits the plan. Raises ApiError 429 where too many wait, 503 while shutting down, 500
        where the decoder broke."""
        self._plan = plan
        self._options = options
        self._backend = backend
        self._report = backend.report
        self._form = form
        self._metrics = metrics
        self._record = record
        self._begun = False
        record.note(version=plan.version, prompt_tokens=plan.prompt_tokens)
        record.note_text(prompts=[request.prompt for request in plan.requests])
        try:
            self._group = backend.loop.submit(plan.requests)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from error
        except LoopStoppedError as error:
            raise _stopped(error) from error

    def cancel(self) -> None:
        """Free the slots of what is not complete."""
        self._group.cancel()

    async def whole(self) -> BaseModel:
        """The answers, once all are there. Raises ApiError."""
        tokens: list[list[GrownToken]] = [[] for _ in self._plan.requests]
        async for growth in self._grown():
            tokens[growth.index] += growth.tokens
        answers = self._group.answers
        scores, problem = await self._scores(answers)
        chosen = self._chosen(scores, problem)
        choices = []
        for index, place in enumerate(chosen):
            answer = answers[place]
            mara = self._summary(answer, scores[place], problem)
            if "mara" in mara and self._options is not None and self._options.trace:
                mara["mara"].trace = [self._report.trace(token) for token in tokens[place]]
            reason = cast(FinishReason, answer.finish_reason)  # the others have raised
            choices.append(self._form.choice(index, answer.text, tokens[place], reason, mara))
        return self._form.whole(choices, self._usage())

    async def events(self, *, include_usage: bool) -> AsyncGenerator[str]:
        """Server-sent events, ``[DONE]`` at the end; an error becomes the last event."""
        form, options = self._form, self._options or MaraOptions()
        try:
            openings = [form.opening(index) for index in range(len(self._plan.requests))]
            if any(openings):
                yield "".join(_event(opening) for opening in openings if opening)
            late: list[int] = []  # complete, but their scores are to come
            async for growth in self._grown():
                parts = []
                if growth.tokens:
                    mara: Mara = {}
                    if options.trace:
                        trace = [self._report.trace(token) for token in growth.tokens]
                        mara = {"mara": MaraPart(trace=trace)}
                    parts.append(form.growth(growth.index, growth.tokens, mara))
                if growth.finish_reason and options.scores:
                    late.append(growth.index)
                elif growth.finish_reason:
                    parts.append(self._end(growth.index, None, None))
                if parts:
                    yield "".join(map(_event, parts))
            if late:
                answers = [self._group.answers[index] for index in late]
                scores, problem = await self._scores(answers)
                for index, own in zip(late, scores, strict=True):
                    yield _event(self._end(index, own, problem))
            usage = self._usage()
            if include_usage:
                yield _event(form.usage(usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent
            self._record.note(error=str(error))
            yield _event(error.body)

    async def _grown(self) -> AsyncGenerator[AnswerGrowth]:
        try:
            async for growth in self._group:
                if not self._begun:
                    self._begun = True
                    self._metrics.first_token(self._record.age_s)
                    self._record.note(first_token_s=round(self._record.age_s, 4))
                if growth.finish_reason == "failed":
                    raise ApiError(
                        500, "the LLM's hidden states are not finite on this prompt", code="failed"
                    )
                yield growth
        except LoopStoppedError as error:
            raise _stopped(error) from error

    async def _scores(
        self, answers: Sequence[DecodedAnswer]
    ) -> tuple[list[dict[str, float | None] | None], str | None]:
        """Scores of answers where they are asked for, and why there are none."""
        options, scorer = self._options, self._backend.scorer
        if options is None or not (options.scores or options.best_of) or scorer is None:
            return [None] * len(answers), None
        pairs = [(answer.prompt, answer.text) for answer in answers]
        try:
            rows = await asyncio.to_thread(scorer.score, pairs)
        except (RetryableError, ConfigError, DataError) as error:
            return [dict.fromkeys(scorer.names) for _ in answers], first_line(error)
        found = [
            {
                name: float(value) if math.isfinite(value) else None
                for name, value in zip(scorer.names, row, strict=True)
            }
            for row in rows
        ]
        missing = any(value is None for scores in found for value in scores.values())
        return list(found), "a score did not come or is not finite" if missing else None

    def _chosen(
        self, scores: Sequence[dict[str, float | None] | None], problem: str | None
    ) -> list[int]:
        """The answers to give, by place; of ``best_of`` those that rank first for each prompt.

        Raises ApiError 503 where nothing could be ranked.
        """
        total, each = self._plan.answers_per_prompt, self._plan.choices_per_prompt
        if self._options is None or self._options.best_of is None:
            return list(range(len(self._plan.requests)))
        ranks = [_rank(own or {}, self._options.rank_by) for own in scores]
        chosen: list[int] = []
        for start in range(0, len(ranks), total):
            places = sorted(range(start, start + total), key=lambda place: -ranks[place])[:each]
            if ranks[places[-1]] == -math.inf:
                raise ApiError(503, f"mara.best_of: {problem}", code="scores_unavailable")
            chosen += places
        return chosen

    def _end(
        self, index: int, scores: dict[str, float | None] | None, problem: str | None
    ) -> BaseModel:
        answer = self._group.answers[index]
        mara = self._summary(answer, scores, problem)
        return self._form.end(index, cast(FinishReason, answer.finish_reason), mara)

    def _summary(
        self,
        answer: DecodedAnswer,
        scores: dict[str, float | None] | None,
        problem: str | None,
    ) -> Mara:
        if self._options is None:
            return {}
        part = MaraPart(examined=answer.examined, looked=answer.looked, kl=round(answer.kl, 5))
        if scores is not None:
            part.scores = scores
        if problem is not None:
            part.scores_error = problem
        return {"mara": part}

    def _usage(self) -> Usage:
        answers = self._group.answers
        tokens = sum(len(answer.token_ids) for answer in answers)
        reasons = [answer.finish_reason for answer in answers]
        self._record.note(completion_tokens=tokens, finish_reasons=reasons)
        self._record.note_text(answers=[answer.text for answer in answers])
        prompt = self._plan.prompt_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)


def _rank(scores: dict[str, float | None], weights: dict[str, float]) -> float:
    """Σ weight · score; −∞ where a score is missing."""
    values = [(weight, scores.get(name)) for name, weight in weights.items()]
    return sum(-math.inf if value is None else weight * value for weight, value in values)


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


def _stopped(error: LoopStoppedError) -> ApiError:
    """The decoder broke (its health check fails as well), or the server is shutting down."""
    return ApiError(500 if error.__cause__ else 503, str(error), code="stopped")
