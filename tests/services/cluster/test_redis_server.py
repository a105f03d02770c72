import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.exceptions import MasterDownError, TryAgainError

from mara_rl.common.errors import ConfigError, RetryableError
from mara_rl.prompts.prompt_files import PromptRecord
from services.cluster.redis_server import (
    connect,
    embedded_redis,
    redis_errors,
    redis_url,
)
from services.prompt_queue.prompt_queue import PromptQueue


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MARA_REDIS_URL", raising=False)


def answers(url: str) -> bool:
    try:
        return connect(url, retries=0).ping()
    except redis.ConnectionError:
        return False


# A Redis of one's own -----------------------------------------------------------------------------


def test_the_url_of_the_environment_is_used(empty_redis, monkeypatch, tmp_path):
    monkeypatch.setenv("MARA_REDIS_URL", empty_redis)
    for allow_embedded in (True, False):
        with redis_url(allow_embedded=allow_embedded) as url:
            assert url == empty_redis
    assert not (tmp_path / "home" / "redis").exists()


def test_no_url_and_no_embedding_names_the_variable():
    with (
        pytest.raises(ConfigError, match="MARA_REDIS_URL is not set"),
        redis_url(allow_embedded=False),
    ):
        pass


@pytest.mark.parametrize(
    "url",
    ["http://:secret@host:1/0", "redis://:secret@host:port/0", "host:6379", "://:secret@"],
)
def test_bad_urls_are_named_without_the_password(url, monkeypatch):
    monkeypatch.setenv("MARA_REDIS_URL", url)
    with (
        pytest.raises(ConfigError, match="expected redis://") as caught,
        redis_url(allow_embedded=True),
    ):
        pass
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_nothing_at_the_url_is_worth_a_retry(monkeypatch):
    monkeypatch.setenv("MARA_REDIS_URL", "redis://user:secret@127.0.0.1:1/0")
    with (
        pytest.raises(RetryableError, match=r"redis://\*\*\*@127\.0\.0\.1:1/0") as caught,
        redis_url(allow_embedded=True),
    ):
        pass
    assert "secret" not in str(caught.value)


def test_password_right_and_wrong(start_redis, monkeypatch):
    server = start_redis(password="s3cret")
    monkeypatch.setenv("MARA_REDIS_URL", server.url)
    with redis_url(allow_embedded=False) as url:
        assert PromptQueue(connect(url), "q").push([PromptRecord("a", "text")]) == 1
    for wrong in (server.url.replace("s3cret", "wr0ng"), server.url.replace(":s3cret@", "")):
        monkeypatch.setenv("MARA_REDIS_URL", wrong)
        with (
            pytest.raises(ConfigError, match="refused access") as caught,
            redis_url(allow_embedded=False),
        ):
            pass
        assert "wr0ng" not in str(caught.value)


def test_an_old_server_is_refused(empty_redis, monkeypatch):
    monkeypatch.setenv("MARA_REDIS_URL", empty_redis)
    monkeypatch.setattr(redis.Redis, "info", lambda *_: {"redis_version": "6.0.16"})
    with (
        pytest.raises(ConfigError, match=r"is 6\.0\.16, expected 6\.2 or later"),
        redis_url(allow_embedded=False),
    ):
        pass


def test_errors_that_may_pass_and_others(empty_redis):
    client = connect(empty_redis)
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(RetryableError, match="cannot serve"), redis_errors(empty_redis):
            client.set("key", "value")
    finally:
        client.config_set("maxmemory", "0")
    client.set("key", "value")
    full = redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but")
    with pytest.raises(RetryableError, match="cannot serve: MISCONF"), redis_errors(empty_redis):
        raise full
    # What the client makes of MASTERDOWN and TRYAGAIN.
    for passing in (MasterDownError("Link with MASTER is down"), TryAgainError("rehashing")):
        with pytest.raises(RetryableError, match="cannot serve"), redis_errors(empty_redis):
            raise passing
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"), redis_errors(empty_redis):
        client.hget("key", "field")


# The embedded one ---------------------------------------------------------------------------------


def test_embedded_data_stays_and_the_server_does_not(tmp_path):
    with redis_url(allow_embedded=True) as url:
        PromptQueue(connect(url), "q").push([PromptRecord("a", "text")])
        pending = PromptQueue(connect(url), "q").read("reader", 1)
    assert len(pending) == 1
    assert not answers(url)
    socket = Path(url.removeprefix("unix://"))
    assert not socket.parent.exists()
    assert not (tmp_path / "home" / "redis" / "url").exists()
    with redis_url(allow_embedded=True) as again:
        assert again != url
        assert PromptQueue(connect(again), "q").read_pending("reader") == pending


def test_only_the_user_can_reach_it(tmp_path):
    with redis_url(allow_embedded=True) as url:
        socket = Path(url.removeprefix("unix://"))
        assert socket.stat().st_mode & 0o077 == 0
        assert socket.parent.stat().st_mode & 0o077 == 0
        assert (tmp_path / "home" / "redis").stat().st_mode & 0o077 == 0
        assert connect(url).config_get("port") == {"port": "0"}


PROCESS = """
import sys, time
from services.cluster.redis_server import connect, redis_url
with redis_url(allow_embedded=True) as url:
    connect(url).rpush("users", sys.argv[1])
    print(url, flush=True)
    sys.stdin.readline()
"""


def start_process(name: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)
    assert process.returncode == 0


def test_processes_share_the_server_and_the_last_stops_it():
    first, url = start_process("first")
    second, same = start_process("second")
    assert url == same != ""
    finish(first)
    assert connect(url).lrange("users", 0, -1) == ["first", "second"]
    finish(second)
    assert not answers(url)


def test_processes_that_start_at_once_share_one_server():
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    urls = {process.stdout.readline().strip() for process in started if process.stdout}
    assert len(urls) == 1
    assert sorted(connect(urls.pop()).lrange("users", 0, -1)) == ["0", "1", "2", "3"]
    for process in started:
        finish(process)


def test_a_server_whose_user_was_killed_is_taken_over():
    process, url = start_process("victim")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert answers(url)
    with redis_url(allow_embedded=True) as taken:
        assert taken == url
        assert connect(taken).lrange("users", 0, -1) == ["victim"]
    assert not answers(url)


def test_a_server_killed_with_its_user_comes_back_with_its_data(tmp_path):
    process, url = start_process("victim")
    time.sleep(1.2)  # the append-only file is written to disk every second
    for pid in (connect(url).info("server")["process_id"], process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    with redis_url(allow_embedded=True) as again:
        assert again != url
        assert connect(again).lrange("users", 0, -1) == ["victim"]
    assert not Path(url.removeprefix("unix://")).parent.exists()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server():
    with redis_url(allow_embedded=True) as url:
        assert os.getpgid(connect(url).info("server")["process_id"]) != os.getpgid(0)


def test_in_use_but_not_answering_is_an_error(tmp_path):
    folder = tmp_path / "redis"
    with embedded_redis(folder) as url:
        address = (folder / "url").read_text()
        (folder / "url").write_text(
            f"unix://{tmp_path}/elsewhere/redis.sock"
        )  # as from another machine
        with (
            pytest.raises(ConfigError, match="used by another process but does not answer"),
            embedded_redis(folder),
        ):
            pass
        (folder / "url").write_text(address)
    assert not answers(url)


def test_damaged_data_is_an_error_with_the_reason(tmp_path):
    folder = tmp_path / "redis"
    folder.mkdir()
    (folder / "appendonly.aof").write_bytes(b"*2\r\nnot redis' own\r\n" * 5)
    with (
        pytest.raises(ConfigError, match=r"did not start: .*Bad file format"),
        embedded_redis(folder),
    ):
        pass
    assert not (folder / "url").exists()
