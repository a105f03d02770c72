import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from queue_readers import hold_one, take_and_deliver

from mara_rl.common.errors import RetryableError
from mara_rl.prompts.prompt_files import PromptRecord
from services.prompt_queue import prompt_source
from services.prompt_queue.prompt_queue import PromptQueue, QueueLost
from services.prompt_queue.prompt_source import PromptSourceConfig, RedisPromptSource


@pytest.fixture
def config(empty_redis) -> PromptSourceConfig:
    config = PromptSourceConfig(url=empty_redis, seed=3, deadline_s=0.3, heartbeat_s=0.05)
    config.open_queue(create=True).push([PromptRecord(f"p{i}", f"text {i}") for i in range(12)])
    return config


@pytest.fixture
def open_source() -> Iterator[Callable[[PromptSourceConfig], RedisPromptSource]]:
    """Opens sources that stop giving signs of life when the test ends."""
    with contextlib.ExitStack() as stack:

        def open_one(config: PromptSourceConfig) -> RedisPromptSource:
            source = RedisPromptSource(config)
            stack.callback(source.close)
            return source

        yield open_one


def take(source: RedisPromptSource, number: int) -> list[str]:
    return [source.next().prompt_id for _ in range(number)]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in 20 s"
        time.sleep(0.02)


def test_one_consumer_sees_the_queues_order(config, open_source):
    plain = take(open_source(config), 30)
    config.open_queue().restart()
    assert take(open_source(config.model_copy(update={"prefetch": 1})), 30) == plain
    other_seed = config.model_copy(update={"seed": 4})
    other_seed.open_queue().restart()
    assert take(open_source(other_seed), 30) != plain


def test_restart_hands_out_the_undelivered_again_in_order(config, open_source):
    source, queue = open_source(config), config.open_queue()
    given = [source.next() for _ in range(5)]
    queue.mark_delivered([given[1].entry_id])
    source.restart(np.random.default_rng(0))
    again = [source.next() for _ in range(4)]
    assert again == [given[0], given[2], given[3], given[4]]
    assert len(set(take(source, 7))) == 7  # the rest of the epoch follows, each once


def test_no_prompt_in_time_says_what_to_do(empty_redis, open_source):
    config = PromptSourceConfig(url=empty_redis, deadline_s=0.2)
    config.open_queue(create=True)
    source = open_source(config)
    with pytest.raises(RetryableError, match=r"no prompt in queue 'default' within 0\.2 s: push"):
        source.next()


def test_a_source_does_not_wait_in_a_queue_that_is_not_there(empty_redis, open_source):
    """Redis lost it: only who can push its prompts again makes a new one."""
    source = open_source(PromptSourceConfig(url=empty_redis, deadline_s=60))
    began = time.monotonic()
    with pytest.raises(QueueLost, match="queue 'default' is missing from Redis"):
        source.next()
    assert time.monotonic() - began < 10
    with pytest.raises(QueueLost):
        source.config.open_queue().status()


def test_reject_and_fail_reach_the_queue(config, open_source):
    source, queue = open_source(config), config.open_queue()
    bad, failed = source.next(), source.next()
    source.reject(bad, "longer than the context")
    source.fail(failed, "reward timed out")
    assert [letter["reason"] for letter in queue.dead_letters()] == ["longer than the context"]
    rest = take(source, 11)
    assert bad.prompt_id not in rest
    assert rest[-1] == failed.prompt_id


def test_close_gives_back_the_unfinished(config, open_source):
    source = open_source(config)
    given = source.next()
    source.close()
    source.close()
    assert config.open_queue().status().pending == {}
    assert open_source(config).next() == given


def test_the_config_travels_and_hides_the_password():
    config = PromptSourceConfig(url="redis://:secret@host:6379/0")
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  (our own bytes)
    assert "secret" not in repr(config)
    assert "secret" not in str(config)


def test_redis_away_is_tried_again_and_then_named(monkeypatch):
    monkeypatch.setattr(prompt_source, "_WAIT_MAX_S", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"redis://:secret@127.0.0.1:{unused.getsockname()[1]}/0"
        with pytest.raises(RetryableError, match=r"Redis at redis://\*\*\*@127\.0\.0\.1") as caught:
            RedisPromptSource(PromptSourceConfig(url=url)).next()
    assert "secret" not in str(caught.value)


def test_a_redis_that_comes_back_is_used_again(start_redis, open_source):
    own_redis = start_redis()
    config = PromptSourceConfig(url=own_redis.url, deadline_s=5)
    config.open_queue(create=True).push([PromptRecord(f"p{i}", f"text {i}") for i in range(6)])
    source = open_source(config.model_copy(update={"prefetch": 1}))
    first = take(source, 2)
    own_redis.kill()
    threading.Timer(0.5, own_redis.start).start()
    rest = take(source, 4)
    assert sorted(first + rest) == [f"p{i}" for i in range(6)]


def test_prompts_of_a_lost_reply_are_not_lost(config, monkeypatch, open_source):
    """The server handed prompts out, the connection broke before they arrived."""
    source = open_source(config.model_copy(update={"prefetch": 2}))
    first = take(source, 2)
    read = PromptQueue.read

    def read_and_break(self, *args):
        monkeypatch.setattr(PromptQueue, "read", read)
        read(self, *args)
        raise prompt_source.redis.ConnectionError("connection reset")

    monkeypatch.setattr(PromptQueue, "read", read_and_break)
    rest = take(source, 10)
    assert len(set(first + rest)) == 12


def test_a_slow_reader_keeps_its_prompts_while_a_dead_one_loses_them(config, open_source):
    impatient = config.model_copy(update={"dead_after_s": 0.5, "prefetch": 1})
    process = multiprocessing.get_context("spawn").Process(
        target=hold_one, args=(impatient,), daemon=True
    )
    process.start()
    queue = impatient.open_queue()
    wait_until(lambda: sum(reader.pending for reader in queue.status().pending.values()) == 1)
    slow = open_source(impatient)
    kept = slow.next()
    time.sleep(1.5)  # three times as long as a dead reader may be silent
    status = queue.status()
    assert [reader.pending for reader in status.pending.values()] == [1, 1]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: queue.status().pending.keys() == {slow.consumer})
    assert queue.read_pending(slow.consumer) == [kept]
    assert len(set(take(slow, 11))) == 11  # the dead one's prompt among them


def test_processes_share_an_epoch(config):
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        shares = pool.starmap(take_and_deliver, [(config, 4)] * 3)
    assert sorted(name for share in shares for name in share) == sorted(f"p{i}" for i in range(12))
    assert config.open_queue().status().delivered == 12


def test_a_forgotten_source_stops_its_thread(config):
    source = RedisPromptSource(config)
    name = f"heartbeat-{source.consumer}"
    assert name in [thread.name for thread in threading.enumerate()]
    del source
    gc.collect()
    wait_until(lambda: name not in [thread.name for thread in threading.enumerate()])
