"""The HTTP API: OpenAI's routes over a `Backend`, health, metrics and the playground."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from services.endpoint.answer_formats import AnswerFormat, ChatFormat, TextFormat
from services.endpoint.answering import Answering
from services.endpoint.api_gate import ApiGate
from services.endpoint.decode_plan import Backend, find_agent, plan
from services.endpoint.endpoint import Endpoint
from services.endpoint.metrics_page import metrics_page
from services.endpoint.openai_answers import ChatCompletion, ModelCard, ModelList, TextCompletion
from services.endpoint.openai_requests import ChatRequest, CompletionRequest
from services.endpoint.request_record import RequestRecord
from services.http.api_errors import ApiError, ErrorBody, invalid_body
from services.http.disconnect import EventStream, while_connected

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("playground.html")


class Health(BaseModel):
    """What ``GET /health`` says of a server that is well."""

    status: str = "ok"
    llm: str
    scores: list[str]


def create_api(endpoint: Endpoint) -> FastAPI:
    """The ASGI application."""
    api = FastAPI(title="mara-rl", docs_url=None, redoc_url=None)  # those pages load from a CDN
    api.add_middleware(
        ApiGate,
        keys=endpoint.keys,
        metrics=endpoint.metrics,
        max_body_bytes=endpoint.limits.max_body_bytes,
        log_text=endpoint.log_text,
    )
    _handle_errors(api)
    _add_answers(api, endpoint)
    _add_models(api, endpoint)
    _add_operations(api, endpoint)
    return api


def _add_answers(api: FastAPI, endpoint: Endpoint) -> None:
    async def answer(
        request: Request,
        body: ChatRequest | CompletionRequest,
        form: type[AnswerFormat],
    ) -> Response:
        backend, record = await endpoint.settled_backend(), RequestRecord.of(request)
        record.note(model=body.model, stream=bool(body.stream), user=body.user)
        planned = await plan(body, backend, endpoint.limits)
        shape = form(body.model, planned.version, backend.report, body.num_top_logprobs)
        answers = Answering(planned, body.mara, backend, shape, endpoint.metrics, record)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = answers.events(include_usage=include_usage)
            return EventStream(events, at_end=answers.cancel)
        try:
            whole = await while_connected(request.receive, answers.whole())
        finally:
            answers.cancel()
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    @api.post("/v1/chat/completions", response_model=ChatCompletion, **_STREAMS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """An answer to a conversation; with ``stream`` server-sent events."""
        return await answer(request, body, ChatFormat)

    @api.post("/v1/completions", response_model=TextCompletion, **_STREAMS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """How raw text goes on; with ``stream`` server-sent events."""
        return await answer(request, body, TextFormat)


def _add_models(api: FastAPI, endpoint: Endpoint) -> None:
    def llm_card(backend: Backend) -> ModelCard:
        name = backend.llm_name
        return ModelCard(id=name, created=backend.deployed, root=name, kind="llm")

    @api.get("/v1/models", **_KEYED)
    async def models() -> ModelList:
        """The LLM, then agents."""
        backend = await endpoint.settled_backend()
        cards = [
            ModelCard(id=name, created=found.created, root=found.version, kind="agent")
            for name, found in backend.catalog.names()
        ]
        return ModelList(data=[llm_card(backend), *cards])

    @api.get("/v1/models/{model:path}", **_KEYED)
    async def model(model: str) -> ModelCard:
        """One of them, or any other version of an agent."""
        backend = await endpoint.settled_backend()
        if model == backend.llm_name:
            return llm_card(backend)
        found = await find_agent(model, backend.catalog)
        return ModelCard(id=model, created=found.created, root=found.version, kind="agent")


def _add_operations(api: FastAPI, endpoint: Endpoint) -> None:
    page = PAGE.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

    @api.get("/health", responses={500: _ERROR, 503: _ERROR})
    async def health() -> Health:
        """Whether this replica can answer: 503 while it loads, 500 when it is broken."""
        backend = await endpoint.settled_backend()
        scores = list(backend.scorer.names) if backend.scorer else []
        return Health(llm=backend.llm_name, scores=scores)

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(await metrics_page(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def _handle_errors(api: FastAPI) -> None:
    def handle(
        kind: type[Exception], handler: Callable[[Request, Any], Awaitable[Response]]
    ) -> None:
        api.add_exception_handler(kind, handler)

    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        record, detail = RequestRecord.of(request), error.body.error
        record.note(error_code=detail.code, param=detail.param)
        record.note_text(error=detail.message)  # may quote the request
        return error.response()

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await api_error(request, invalid_body(error.errors()))

    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = await api_error(request, ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        message = "the server failed on this request; its log says why"
        return ApiError(500, message, code="internal_error").response()

    handle(ApiError, api_error)
    handle(RequestValidationError, invalid)
    handle(HTTPException, http_error)
    handle(Exception, unexpected)


_ERROR: dict[str, Any] = {"model": ErrorBody}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: _ERROR | {"description": "a field is wrong or not supported; `param` names it"},
    401: _ERROR | {"description": "no key, or an unknown one"},
    404: _ERROR | {"description": "no such model"},
    413: _ERROR | {"description": "the body is too large"},
    429: _ERROR | {"description": "too many requests; see the header Retry-After"},
    500: _ERROR | {"description": "the decoder broke, or the LLM failed on this prompt"},
    503: _ERROR | {"description": "loading, shutting down, or MLflow or scores are away"},
}
# `ApiGate` asks for the key; this tells clients that are made from the schema.
_KEY = Security(HTTPBearer(auto_error=False, description="none where the server knows no keys"))
_KEYED: dict[str, Any] = {"responses": _ERRORS, "dependencies": [_KEY]}
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
_STREAMS: dict[str, Any] = _KEYED | {"responses": {200: _STREAM, **_ERRORS}}
