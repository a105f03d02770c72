"""Files that one process at a time holds."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from mara_rl.errors import ConfigError

_POLL_S = 1.0


@contextlib.contextmanager
def held(path: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Keep all other processes, also on other machines, from holding this file.

    The system gives it free when this process ends, however it ends. Raises ConfigError with
    ``refusal`` when another one still holds it after ``wait_s``.
    """
    patience = Retrying(
        stop=stop_after_delay(wait_s),
        wait=wait_fixed(_POLL_S),
        retry=retry_if_exception_type(BlockingIOError),
        reraise=True,
    )
    with open(path, "w") as file:
        try:
            patience(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        yield
