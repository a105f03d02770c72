"""Why rollout actors failed, on one line each."""

import logging
import re

_NAMES_AN_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Timeout)\b")


class RunnerErrors(logging.Handler):
    """Takes RLlib's notes on failed actors, whole tracebacks, and keeps the cause of the last.

    The notes go no further: their cause is shown by whoever asks for `last`.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._cause = ""
        source = logging.getLogger("ray.rllib.utils.actor_manager")
        source.addHandler(self)
        source.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self._cause = cause(record.getMessage())

    def last(self) -> str:
        """The cause of the latest failure since the last call, "" when there was none."""
        latest, self._cause = self._cause, ""
        return latest


def cause(message: str) -> str:
    """The line of a traceback that names the exception, else the message's first line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [
        line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Timeout)\b", line)
    ]
    return (named[-1] if named else lines[0] if lines else "").rstrip(", ")[:300]
