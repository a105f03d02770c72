"""Files that one process at a time holds."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from mara_rl.errors import ConfigError


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Keep all other processes, also on other machines, from holding this file.

    The system gives it free when this process ends, however it ends. Raises ConfigError with
    ``refusal`` when another one holds it.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        yield
