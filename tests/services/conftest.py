"""A real redis-server for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis_servers import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendonly", "no", "--save", "")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def empty_redis(redis_server: RedisServer) -> str:
    """URL of a server without data."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers of this test alone, which it may kill and start again."""
    servers: list[RedisServer] = []

    def start(*options: str, password: str = "") -> RedisServer:
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, *options, password=password))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
