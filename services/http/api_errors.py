"""Errors of the HTTP API, in OpenAI's shape."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from mara_rl.common.errors import ConfigError, DataError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1
UNSUPPORTED = "unsupported_parameter"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="one line")
    type: str = Field(description="the kind of error, e.g. invalid_request_error")
    param: str | None = Field(description="the field of the request that is wrong, as a path")
    code: str | None = Field(description="a name for programs, e.g. model_not_found")


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 and above."""

    error: ErrorDetail


class ApiError(Exception):
    """An error the client is told of."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        """What is sent, with the headers that the status asks for."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        return JSONResponse(self.body.model_dump(), self.status, headers)


@contextlib.contextmanager
def bad_request(param: str, code: str | None = None) -> Iterator[None]:
    """Turn what the core has against a request into status 400 that names ``param``."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise ApiError(400, str(error), param=param, code=code) from error


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Status 400 for the first thing pydantic found wrong with a body."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: not JSON ({first['ctx']['error']})", code="invalid_json")
    if isinstance(first["input"], bytes):
        return ApiError(400, "body: expected Content-Type: application/json", code="invalid_json")
    if any(map(_is_member, first["loc"])):  # of the members of a union the one that got furthest
        first = max(problems, key=lambda problem: _shared(problem, first) * len(problem["loc"]))
    path = [str(part) for part in first["loc"][1:] if not _is_member(part)]  # after "body"
    param = ".".join(path) or None
    if first["type"] in ("extra_forbidden", UNSUPPORTED):
        return ApiError(
            400, f"{param}: not supported by this server", param=param, code=UNSUPPORTED
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'body'}: missing", param=param, code="missing_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and param is None:  # of fields together; says which
        return ApiError(400, message, param=message.partition(":")[0], code="invalid_value")
    found = repr(first["input"])
    shown = found if len(found) <= 80 else f"{found[:80]}…"
    return ApiError(
        400,
        f"{param or 'body'}: {message[:1].lower()}{message[1:]}, not {shown}",
        param=param,
        code="invalid_value",
    )


def _is_member(part: str | int) -> bool:
    """Whether a part of pydantic's path names the member of a union that it tried."""
    return isinstance(part, str) and (part == "str" or "[" in part)


def _shared(problem: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether two problems are about the same union."""
    place = next(place for place, part in enumerate(first["loc"]) if _is_member(part))
    return problem["loc"][:place] == first["loc"][:place]
