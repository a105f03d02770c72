"""Prompts for rollouts out of a Redis queue, with sign of life and recovery."""

import contextlib
import logging
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import redis
from pydantic import Field
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from envs.protocols import Prompt
from mara_rl.common.errors import RetryableError
from mara_rl.common.yaml_settings import Section
from services.cluster.redis_server import connect, redis_errors
from services.prompt_queue.prompt_queue import PromptQueue, QueueLost

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_ATTEMPTS = 6
_WAIT_MAX_S = 5.0  # six attempts: at most about 15 s of waiting


class PromptSourceConfig(Section):
    """How a rollout actor gets at its prompts; plain data that can be sent to it."""

    url: str = Field(repr=False, description="URL of Redis; may hold a password")
    queue: str = Field("default", description="name of the prompt queue")
    seed: int = Field(0, description="orders the epochs; the same for all readers of a queue")
    consumer: str = Field("runner", description="name shown in the status; made unique per source")
    deadline_s: float = Field(60.0, gt=0, description="longest wait for a prompt")
    prefetch: int = Field(8, ge=1, description="prompts fetched in one call")
    heartbeat_s: float = Field(5.0, gt=0, description="time between signs of life")
    dead_after_s: float = Field(60.0, gt=0, description="silence after which a reader is dead")
    max_failures: int = Field(3, ge=1, description="failed episodes until a prompt is dead")
    max_deliveries: int = Field(5, ge=1, description="readers that died on a prompt until it is")

    def open_queue(self, *, retries: int = 5, create: bool = False) -> PromptQueue:
        """The queue this describes, on a connection of its own; see `PromptQueue`."""
        with redis_errors(self.url):
            return PromptQueue(
                connect(self.url, retries=retries),
                self.queue,
                seed=self.seed,
                max_failures=self.max_failures,
                max_deliveries=self.max_deliveries,
                create=create,
            )


class RedisPromptSource:
    """A `PromptSource` over a queue: one consumer, prompts in queue order, none ever lost.

    A thread gives signs of life while an answer takes its time, and takes over what dead consumers
    held. Every method raises RetryableError, naming the URL without its password, when Redis stays
    away over six attempts, and QueueLost when it has lost the queue.
    """

    def __init__(self, config: PromptSourceConfig) -> None:
        self.config = config
        # A restarted actor must not pass for its predecessor, whose entries count as lost.
        self.consumer = f"{config.consumer}-{uuid.uuid4().hex[:8]}"
        self._ready: deque[Prompt] = deque()
        self._given: set[str] = set()
        self._replies_lost = False
        # The client does not retry by itself: a lost reply to a read has to be noticed here.
        self._queue = config.open_queue(retries=0)
        stop = threading.Event()
        self._stop = weakref.finalize(self, stop.set)
        self._heartbeat = threading.Thread(
            target=_keep_alive,
            args=(self._queue, self.consumer, config, stop),
            name=f"heartbeat-{self.consumer}",
            daemon=True,
        )
        self._heartbeat.start()

    def next(self) -> Prompt:
        """The next prompt. Raises RetryableError when none comes within ``deadline_s``."""
        if not self._ready:
            self._ready.extend(self._attempt(self._fetch))
        if not self._ready:
            raise RetryableError(
                f"no prompt in queue {self.config.queue!r} within {self.config.deadline_s:g} s: "
                "push some with `mara-rl prompts push FILE`"
            )
        prompt = self._ready.popleft()
        self._given.add(prompt.entry_id)
        return prompt

    def _fetch(self) -> list[Prompt]:
        if self._replies_lost:
            pending = self._queue.read_pending(self.consumer)
            self._replies_lost = False
            unseen = [prompt for prompt in pending if prompt.entry_id not in self._given]
            if unseen:
                return unseen
        return self._queue.read(
            self.consumer, self.config.prefetch, round(self.config.deadline_s * 1000)
        )

    def reject(self, prompt: Prompt, reason: str) -> None:
        """Take a prompt that can never be answered out of circulation: a dead letter at once."""
        self._attempt(lambda: self._queue.reject(prompt.entry_id, reason))

    def fail(self, prompt: Prompt, reason: str) -> None:
        """The episode of this prompt failed: try it again later, up to ``max_failures`` times."""
        self._attempt(lambda: self._queue.fail(prompt.entry_id, reason))

    def restart(self, generator: np.random.Generator) -> None:
        """Hand out anew, oldest first, what is not delivered; the order is the queue's own."""
        self._ready = deque(self._attempt(lambda: self._queue.read_pending(self.consumer)))
        self._given.clear()
        self._replies_lost = False

    def close(self) -> None:
        """Give back what is unfinished. Safe to call twice."""
        if self._stop.alive:
            self._stop()
            self._heartbeat.join()
            self._ready.clear()
            with contextlib.suppress(QueueLost):  # then it holds nothing of ours
                self._attempt(lambda: self._queue.release(self.consumer))

    def _attempt(self, operation: Callable[[], _Result]) -> _Result:
        def note(_: object) -> None:
            self._replies_lost = True

        retrying = Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.2, max=_WAIT_MAX_S),
            retry=retry_if_exception(_may_pass),
            after=note,
            reraise=True,
        )

        def translated() -> _Result:
            with redis_errors(self.config.url):
                return operation()

        return retrying(translated)


def _may_pass(error: BaseException) -> bool:
    """Redis may come back; a queue that it has lost will not."""
    return isinstance(error, RetryableError) and not isinstance(error, QueueLost)


def _keep_alive(
    queue: PromptQueue, consumer: str, config: PromptSourceConfig, stop: threading.Event
) -> None:
    # Holds no reference to the source, so that a forgotten source ends its thread.
    while not stop.wait(config.heartbeat_s):
        try:
            queue.beat(consumer)
            taken = queue.reclaim(round(config.dead_after_s * 1000))
        except (redis.RedisError, QueueLost) as error:
            _log.warning("no sign of life to queue %r this time: %s", config.queue, error)
        else:
            if taken:
                _log.warning("queue %r: took %d prompts of dead readers", config.queue, taken)
