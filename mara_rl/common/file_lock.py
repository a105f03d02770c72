"""Files that one process at a time holds."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from mara_rl.common.errors import ConfigError

_POLL_S = 1.0


@contextlib.contextmanager
def held(path: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Keep all other processes, also on other machines, from holding this file.

    The system gives it free when this process ends, however it ends. Raises ConfigError with
    ``refusal`` when another one still holds it after ``wait_s``, and FileNotFoundError when its
    folder is gone by then.
    """
    patience = Retrying(
        stop=stop_after_delay(wait_s),
        wait=wait_fixed(_POLL_S),
        retry=retry_if_exception_type(BlockingIOError),
        reraise=True,
    )
    try:
        file = patience(_locked, path)
    except BlockingIOError:
        raise ConfigError(refusal) from None
    with file:
        yield


def _locked(path: Path) -> IO[str]:
    with contextlib.ExitStack() as failing:
        file = failing.enter_context(open(path, "w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError(f"{path} was replaced before it was locked")
        failing.pop_all()
        return file
