"""What reached the learner, seen from Redis itself rather than from the queue's own books."""

import threading
import time
from collections import Counter

import redis


class DeliveryLog:
    """Follows a redis-server's MONITOR through its restarts.

    Attributes:
        tickets: how often each "epoch sample prompt" was recorded as delivered.
    """

    def __init__(self, url: str) -> None:
        self.tickets: Counter[str] = Counter()
        self._url = url
        self._recorded: set[str] = set()
        self._ready = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        assert self._ready.wait(20)

    def _follow(self) -> None:
        while not self._closed.is_set():
            client = redis.Redis.from_url(self._url, socket_connect_timeout=5)
            try:
                with client.monitor() as monitor:
                    self._ready.set()
                    for seen in monitor.listen():
                        # `services.prompt_queue.prompt_scripts.DELIVER` does this for each entry.
                        command, key, rest = [*seen["command"].split(" ", 2), "", ""][:3]
                        # Without Lua it is `PromptQueue.remember`.
                        in_script = seen["client_type"] == "lua" and command.lower() == "hset"
                        if in_script and key.endswith(":arrived") and rest not in self._recorded:
                            self._recorded.add(rest)  # with its batch: a command sent again
                            self.tickets[rest.rpartition(" ")[0].strip('"')] += 1
            except redis.RedisError:
                time.sleep(0.02)

    def close(self) -> None:
        """Follow the server no further than to its end."""
        self._closed.set()

    def lost(self, prompt_ids: set[str], epoch: int = 0) -> set[str]:
        """Those of an epoch that have not reached the learner."""
        return {prompt for prompt in prompt_ids if not self.tickets[f"{epoch} 0 {prompt}"]}

    @property
    def duplicates(self) -> int:
        """How many reached it again."""
        return sum(count - 1 for count in self.tickets.values())
