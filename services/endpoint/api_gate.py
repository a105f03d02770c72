"""What every HTTP request passes: keys, limits, the log and the metrics."""

import asyncio
import contextlib
import uuid
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.endpoint.endpoint_metrics import EndpointMetrics
from services.endpoint.request_record import RequestRecord
from services.http.api_errors import ApiError
from services.http.api_keys import ApiKeys, BusyKeyError, UnknownKeyError

PROTECTED = "/v1/"
_CLIENT_LEFT = 499


class ApiGate:
    """ASGI middleware. A key counts as busy until the last byte of its answer."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        metrics: EndpointMetrics,
        max_body_bytes: int,
        log_text: bool,
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._log_text = log_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")[
            :128
        ]  # by Ray Serve's proxy, which tells it itself
        record = RequestRecord(given or uuid.uuid4().hex, log_text=self._log_text)
        scope.setdefault("state", {})["record"] = record
        status = 500  # unless an answer begins

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not given:
                    request_id = record.fields["request_id"].encode()
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._pass(scope, receive, noting_send, record, headers)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except asyncio.CancelledError:  # how Ray Serve tells of it
            status = _CLIENT_LEFT
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            record.note(method=scope["method"], route=route, status=status)
            self._metrics.request_done(route, status, record.age_s)
            record.write()

    async def _pass(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord,
        headers: Mapping[bytes, str],
    ) -> None:
        with contextlib.ExitStack() as running:
            try:
                if scope["path"].startswith(PROTECTED):
                    key = self._keys.identify(headers.get(b"authorization"))
                    record.note(key=key)
                    running.enter_context(self._keys.running(key))
                body = b""
                if scope["method"] == "POST":
                    body = await self._body(receive, headers.get(b"content-length", ""))
            except (ApiError, UnknownKeyError, BusyKeyError) as error:
                await _refusal(error)(scope, receive, send)
                return
            await self._app(scope, _replayed(body, receive), send)

    async def _body(self, receive: Receive, announced: str) -> bytes:
        """The whole body. Raises ApiError 413 where it is too long."""
        too_long = ApiError(
            413,
            f"body: over {self._max_body_bytes} bytes, which is the most",
            code="body_too_large",
        )
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            raise too_long
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise too_long
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives a body already read, then goes on with what comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _refusal(error: ApiError | UnknownKeyError | BusyKeyError) -> Response:
    if isinstance(error, UnknownKeyError):
        error = ApiError(401, str(error), code="invalid_api_key")
    elif isinstance(error, BusyKeyError):
        error = ApiError(429, str(error), code="rate_limit_exceeded")
    return error.response()
