"""Files that one process at a time locks."""

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
def file_lock(path: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Keep all other processes, also on other machines, from locking this file.

    The system gives it free when this process ends, however it ends. Raises ConfigError with
    ``refusal`` when another one still has it locked after ``wait_s``, and FileNotFoundError when
    its folder is gone by then.
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


@contextlib.contextmanager
def blocking_file_lock(path: Path) -> Iterator[None]:
    """The same for as long as it takes, where the file is never replaced."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process has this file locked at this moment."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _locked(path: Path) -> IO[str]:
    with contextlib.ExitStack() as failing:
        file = failing.enter_context(open(path, "w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The package filelock asks for the file's links alone. They stay when its folder is renamed
        # to be removed, and on NFS, which keeps a file that is open under another name.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError(f"{path} was replaced before it was locked")
        failing.pop_all()
        return file
