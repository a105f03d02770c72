"""What is known of one HTTP request: for the log, one JSON line each, and the metrics."""

import json
import logging
import time
from typing import Any

from starlette.requests import Request

logger = logging.getLogger("mara_rl.requests")


class RequestRecord:
    """Filled while a request is served, written when it is done. It never holds a key or, unless
    the server is set to log text, anything of prompt or answer."""

    def __init__(self, request_id: str, *, log_text: bool) -> None:
        self.fields: dict[str, Any] = {"request_id": request_id}
        self._log_text = log_text
        self._began_s = time.monotonic()

    @classmethod
    def of(cls, request: Request) -> "RequestRecord":
        """The record of a request that is being served."""
        return request.state.record

    @property
    def age_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self._began_s

    def note(self, **fields: Any) -> None:
        """Add fields to the record."""
        self.fields.update(fields)

    def note_text(self, **fields: Any) -> None:
        """Note what holds text of prompts or answers; dropped unless text is to be logged."""
        if self._log_text:
            self.note(**fields)

    def write(self) -> None:
        """Write the record to the log; the request is done."""
        self.note(seconds=round(self.age_s, 4))
        logger.info("request", extra={"record": self.fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the fields of a `RequestRecord`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "record", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
