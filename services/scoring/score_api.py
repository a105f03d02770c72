"""A score service over HTTP, with keys: for runs that do not share its Ray cluster."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from starlette.responses import JSONResponse

from mara_rl.common.errors import ConfigError, RetryableError, first_line
from services.http.api_errors import ApiError
from services.http.api_keys import SCORE_KEYS_VARIABLE, ApiKeys, UnknownKeyError, configured_keys
from services.scoring.score_service import ScoreService, ScoreServiceConfig, score_deployment

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20
SCORE_FAILED = "score_failed"


class ScoreRequest(BaseModel):
    """The body of ``POST /v1/score``."""

    model_config = ConfigDict(extra="forbid")

    pairs: list[tuple[str, str]]


class Scores(BaseModel):
    """Its answer: a score for each pair, null where it is not finite."""

    model_config = ConfigDict(extra="forbid")

    scores: list[float | None]

    def as_floats(self) -> list[float]:
        """With NaN for null."""
        return [math.nan if score is None else score for score in self.scores]


class HostedModel(BaseModel):
    """What ``GET /v1/model`` says."""

    model: str


def create_score_api(
    score: Callable[[list[tuple[str, str]]], Awaitable[Sequence[float]]], model: str, keys: ApiKeys
) -> FastAPI:
    """The ASGI application around ``score``, which gives one number for each pair.

    Errors have the shape of `services.http.api_errors`: 401 without a known key, said before the
    body is read; 422 where the model fails on these pairs, 503 where it may succeed later.
    """

    async def known(request: Request) -> None:
        try:
            keys.identify(request.headers.get("authorization"))
        except UnknownKeyError as error:
            raise ApiError(401, str(error), code="invalid_api_key") from error

    routes = APIRouter(prefix="/v1", dependencies=[Depends(known)])

    @routes.get("/model")
    async def hosted() -> HostedModel:
        return HostedModel(model=model)

    @routes.post("/score")
    async def scores(request: Request) -> Scores:
        pairs = await _pairs(request)
        try:
            values = await score(pairs)
        except RetryableError as error:
            raise ApiError(503, str(error), code="scores_unavailable") from error
        except Exception as error:
            logger.exception("the score model failed")
            raise ApiError(
                422, f"{type(error).__name__}: {first_line(error)}", code=SCORE_FAILED
            ) from error
        return Scores(scores=[value if math.isfinite(value) else None for value in values])

    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    # No page and no schema: those would be there without a key.
    api = FastAPI(openapi_url=None, exception_handlers={ApiError: refused})
    api.include_router(routes)
    return api


@serve.ingress()
class KeyedScoreService(ScoreService):
    """One replica that answers HTTP as well; it does not start without keys."""

    def __init__(self, config: ScoreServiceConfig) -> None:
        keys = configured_keys(variable=SCORE_KEYS_VARIABLE)
        if not keys:
            raise ConfigError(f"no keys: set {SCORE_KEYS_VARIABLE} where this score service runs")
        self._keys = ApiKeys(keys)
        super().__init__(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_score_api(self.score, self._config.model, self._keys)


def keyed_score_application(config: ScoreServiceConfig) -> serve.Application:
    """The Serve application of one score with a ``route_prefix``; for an ``import_path``."""
    return score_deployment(KeyedScoreService, config).bind(config)


async def _pairs(request: Request) -> list[tuple[str, str]]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                413, f"body: over {MAX_BODY_BYTES} bytes, which is the most", code="body_too_large"
            )
    try:
        return ScoreRequest.model_validate_json(bytes(body)).pairs
    except ValidationError as error:
        message = f'body: {error.errors()[0]["msg"]}; expected {{"pairs": [[prompt, response]]}}'
        raise ApiError(400, message, code="invalid_value") from error
