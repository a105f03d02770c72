"""Where one score comes from: a Serve application of this cluster, or a score service's URL."""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Protocol

import httpx2
import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from mara_rl.common.errors import ConfigError, DataError, MaraError, RetryableError, first_line
from mara_rl.common.urls import is_http_url
from services.http.api_errors import ErrorBody
from services.http.api_keys import SCORE_KEYS_VARIABLE, configured_keys
from services.scoring.score_api import HostedModel, ScoreRequest, Scores

_DESCRIBE_TIMEOUT_S = 30.0
_REFUSED = (400, 413, 422)  # by the API itself: the same pairs would be refused again


class ScoreSource(Protocol):
    """What gives one score; ``str()`` of it names it in errors."""

    def ask(self, pairs: list[tuple[str, str]], timeout_s: float) -> Sequence[float]:
        """One answer of the service, unchecked.

        Raises RetryableError when it is away, overloaded or takes longer than ``timeout_s``,
        DataError when its model fails on these pairs.
        """
        ...


def score_source(name: str) -> ScoreSource:
    """The source that ``name`` stands for: a URL, else an application.

    Raises ConfigError where it cannot be asked from here.
    """
    return UrlScores(name) if is_http_url(name) else AppScores(name)


class AppScores:
    """A Serve application of the cluster that this process is connected to."""

    def __init__(self, app: str) -> None:
        if not ray.is_initialized():
            raise ConfigError(f"not connected to Ray, which serves app {app!r}")
        try:
            self._handle = serve.get_app_handle(app)
        except RayServeException as error:
            raise ConfigError(f"no Serve application {app!r}: {error}") from error
        self._app = app

    def __str__(self) -> str:
        return f"app {self._app!r}"

    def ask(self, pairs: list[tuple[str, str]], timeout_s: float) -> Sequence[float]:
        """See `ScoreSource`."""
        try:
            response = self._handle.score.remote(pairs)
            try:
                return response.result(timeout_s=timeout_s)
            except TimeoutError as error:
                response.cancel()
                raise RetryableError(_too_slow(timeout_s)) from error
        except RayTaskError as error:  # raised by the replica itself
            kind = RetryableError if isinstance(error.cause, RetryableError) else DataError
            raise kind(_one_line(error.cause)) from error
        except (RayError, RayServeException) as error:  # it is dead, overloaded, out of reach
            raise RetryableError(_one_line(error)) from error


class UrlScores:
    """The HTTP API of a score service (`services.scoring.score_api`), asked with a key.

    The key is the first of ``MARA_SCORE_KEY``, in the environment of the process that asks.
    """

    def __init__(self, url: str) -> None:
        try:
            httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"{url!r} is no URL: {first_line(error)}") from error
        keys = configured_keys(variable=SCORE_KEYS_VARIABLE)
        if not keys:
            raise ConfigError(f"{SCORE_KEYS_VARIABLE} is not set: expected a key that {url} knows")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {keys[0]}"}
        self._tls = ssl.create_default_context()

    def __str__(self) -> str:
        return self._url

    def ask(self, pairs: list[tuple[str, str]], timeout_s: float) -> Sequence[float]:
        """See `ScoreSource`. A score that the service could not give is NaN."""
        body = ScoreRequest.model_construct(pairs=pairs).model_dump_json()
        response = self._call("POST", "score", body, timeout_s)
        try:
            return Scores.model_validate_json(response.content).as_floats()
        except ValidationError as error:
            raise RetryableError("the answer holds no scores") from error

    def model(self, timeout_s: float = _DESCRIBE_TIMEOUT_S) -> str:
        """The score model that the service hosts. Raises RetryableError as `ask` does."""
        response = self._call("GET", "model", None, timeout_s)
        try:
            return HostedModel.model_validate_json(response.content).model
        except ValidationError as error:
            raise RetryableError("the answer names no model") from error

    def _call(self, method: str, path: str, body: str | None, timeout_s: float) -> httpx2.Response:
        async def send() -> httpx2.Response:
            # A client's own timeouts are each for one step of a call; this one is for all of it.
            async with (
                asyncio.timeout(timeout_s),
                httpx2.AsyncClient(verify=self._tls, headers=self._headers, timeout=None) as client,
            ):
                return await client.request(method, f"{self._url}/v1/{path}", content=body)

        try:
            response = asyncio.run(send())
        except TimeoutError as error:
            raise RetryableError(_too_slow(timeout_s)) from error
        except httpx2.HTTPError as error:
            raise RetryableError(_one_line(error)) from error
        if response.status_code != 200:
            raise _refusal(response)
        return response


def check_url(url: str, model: str) -> None:
    """Raise ConfigError unless the score service at ``url`` lets us in and hosts ``model``."""
    try:
        hosted = UrlScores(url).model()
    except RetryableError as error:
        raise ConfigError(
            f"score service {url}: {error}; expected one that runs and hosts {model!r}"
        ) from error
    if hosted != model:
        raise ConfigError(f"score service {url} hosts {hosted!r}, not {model!r}")


def _refusal(response: httpx2.Response) -> MaraError:
    try:
        reason = ErrorBody.model_validate_json(response.content).error.message
    except ValidationError:  # by a proxy on the way
        return RetryableError(f"status {response.status_code}")
    kind = DataError if response.status_code in _REFUSED else RetryableError
    return kind(f"{reason} (status {response.status_code})")


def _too_slow(timeout_s: float) -> str:
    return f"no answer within {timeout_s:.3g} s"


def _one_line(error: BaseException) -> str:
    if isinstance(error, MaraError):  # a sentence for the user already
        return str(error)
    said = first_line(error)
    name = type(error).__name__
    return name if said == name else f"{name}: {said}"
