"""Who may use the API: bearer keys, and how many requests of each may run at once."""

import contextlib
import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mara_rl.common.errors import ConfigError, first_line

KEYS_VARIABLE = "MARA_API_KEY"
SCORE_KEYS_VARIABLE = "MARA_SCORE_KEY"
_MIN_LENGTH = 8


class UnknownKeyError(Exception):
    """No key, or one that is not known; the message says which, never the key."""


class BusyKeyError(Exception):
    """A key has as many requests running as it may."""


class ApiKeys:
    """Bearer keys, compared in constant time; without any, everybody may use the API.

    Not thread-safe: for one event loop.
    """

    def __init__(self, keys: Sequence[str], *, max_concurrent: int | None = None) -> None:
        """
        Args:
            keys: at least 8 characters each, without white space.
            max_concurrent: requests of one key that may run at the same time; None: any number.

        Raises ConfigError for a key that is too short, by its number.
        """
        for number, key in enumerate(keys, 1):
            if len(key) < _MIN_LENGTH or not key.isascii() or any(c.isspace() for c in key):
                raise ConfigError(
                    f"API key {number} of {len(keys)} has {len(key)} characters; expected at least "
                    f"{_MIN_LENGTH} ASCII characters without spaces"
                )
        self._digests = {_digest(key): _digest(key).hex()[:8] for key in dict.fromkeys(keys)}
        self._max_concurrent = max_concurrent
        self._running: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identify(self, authorization: str | None) -> str:
        """A short name for the key in an ``Authorization`` header; "" where no key is needed.

        Raises UnknownKeyError.
        """
        if not self._digests:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise UnknownKeyError("no API key; expected the header 'Authorization: Bearer <key>'")
        digest = _digest(given.strip())
        found = ""
        for known, name in self._digests.items():  # all of them, whichever fits
            if hmac.compare_digest(known, digest):
                found = name
        if not found:
            raise UnknownKeyError("the API key is not known")
        return found

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Count a request of the key ``name`` while it runs. Raises BusyKeyError."""
        most = self._max_concurrent
        if name and most is not None and self._running[name] >= most:
            raise BusyKeyError(
                f"{self._running[name]} requests of this key are running; expected at most {most}"
            )
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1


def configured_keys(file: Path | None = None, *, variable: str = KEYS_VARIABLE) -> list[str]:
    """Keys of ``variable`` (comma-separated) and of ``file`` (one a line, # for comments).

    Raises ConfigError when the file cannot be read or holds none.
    """
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if file is None:
        return keys
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys_file {str(file)!r}: {first_line(error)}") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"keys_file {str(file)!r} holds no key; expected one a line")
    return keys + found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
