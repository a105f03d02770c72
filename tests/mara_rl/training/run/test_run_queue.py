"""A run's queue keeps the books right while a real Redis goes away and comes back."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_queues import entries, records
from redis_servers import RedisServer
from rich.console import Console

from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.run.run_queue import RunQueue
from services.prompt_queue.prompt_queue import PromptQueue
from services.prompt_queue.prompt_source import PromptSourceConfig


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def filled(server: RedisServer, prompts: int) -> tuple[RunQueue, PromptQueue]:
    source = PromptSourceConfig(url=server.url)
    queue = source.open_queue(retries=0, create=True)
    queue.push(records(prompts))
    queue.restart()
    return RunQueue(queue, source, Display(Console(file=io.StringIO()))), queue


def test_what_was_learned_from_while_redis_was_away_is_delivered_once_it_is_back(
    server: RedisServer,
) -> None:
    run_queue, queue = filled(server, 4)
    held = entries(queue.read("a", 3))
    run_queue.learned_from(held[:1])
    server.kill()
    for ask in (run_queue.figures, run_queue.position):
        with pytest.raises(RetryableError, match="Redis at"):
            ask()
    run_queue.learned_from(held[1:2])
    server.start()
    position = run_queue.position()
    assert queue.delivered() == held[:2]
    assert len(position.head) == 1, "the one that is still in hand"
    assert run_queue.figures() == {"queue/waiting": 1, "queue/dead": 0, "queue/duplicates": 0}


def test_only_what_the_position_contains_is_acknowledged(server: RedisServer) -> None:
    run_queue, queue = filled(server, 3)
    held = entries(queue.read("a", 3))
    run_queue.learned_from(held[:1])
    run_queue.position()
    run_queue.learned_from(held[1:2])
    run_queue.figures()
    run_queue.acknowledge()
    assert queue.delivered() == held[1:2]


def test_a_redis_that_lost_the_queue_is_given_what_tells_duplicates(server: RedisServer) -> None:
    run_queue, queue = filled(server, 2)
    run_queue.learned_from(entries(queue.read("a", 1)))
    run_queue.figures()
    [seen] = queue.seen()
    queue._client.flushall()
    with pytest.raises(LostPart, match="is missing from Redis"):
        run_queue.figures()
    assert queue.seen() == [seen]
