"""A run's prompt queue in Redis: filled at the start, kept in step with its checkpoints."""

import contextlib
import uuid
from collections.abc import Iterator

from mara_rl.common.display import Display
from mara_rl.common.errors import RetryableError
from mara_rl.prompts.prompt_files import PromptRecord
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.faults.patience import patience
from mara_rl.training.run.run_context import RunContext
from mara_rl.training.run.run_names import queue_name
from services.cluster.redis_server import redis_errors
from services.prompt_queue.prompt_epochs import QueuePosition
from services.prompt_queue.prompt_queue import PromptQueue, QueueLost
from services.prompt_queue.prompt_source import PromptSourceConfig

_KEPT_S = 7 * 24 * 3600  # of a finished run, for `mara-rl status`


class RunQueue:
    """Every method raises RetryableError while Redis is away, LostPart when the queue is gone.

    Attributes:
        source: how rollout actors get at the queue.
    """

    def __init__(self, queue: PromptQueue, source: PromptSourceConfig, display: Display) -> None:
        self.source = source
        self._queue = queue
        self._display = display
        self._unmarked: dict[str, list[str]] = {}  # learned from, by batch; Redis knows not yet
        self._contained: list[str] = []  # entries that count as delivered in the last position
        self._seen: list[str] = []
        self._duplicates = 0

    @classmethod
    def filled(cls, run: RunContext, position: QueuePosition | None) -> "RunQueue":
        """The queue, standing where a checkpoint says, or at the start for None.

        A Redis that was lost may still be on its way up: it has ``ppo.no_progress_timeout_s``.
        """
        name = queue_name(run.config, run.folder.name, run.tracking.run_id)
        source = run.session.prompts.model_copy(update={"queue": name})

        def fill() -> PromptQueue:
            with redis_errors(source.url):
                queue = source.open_queue(create=True)
                queue.push(run.prompts.train, repeats=run.config.prompts.repeats)
                queue.restart(position)
            return queue

        patient = patience(run.config.ppo.no_progress_timeout_s, run.display, run.check_interrupt)
        return cls(patient(fill), source, run.display)

    def withdraw(self, prompts: list[PromptRecord], reason: str) -> None:
        """These prompts become dead letters."""
        with self._redis():
            self._queue.withdraw([prompt.prompt_id for prompt in prompts], reason)

    def learned_from(self, entry_ids: list[str]) -> None:
        """The episodes of these entries are in the learner's last update.

        They are marked as delivered in Redis by the next call that finds it there.
        """
        self._unmarked[uuid.uuid4().hex] = entry_ids

    def figures(self) -> dict[str, float]:
        """The queue's metrics now."""
        with self._redis():
            self._queue.check_present()
            self._mark()
            self._seen = self._queue.seen()
            status = self._queue.status()
        self._duplicates = status.duplicates
        return {
            "queue/waiting": float(status.waiting),
            "queue/dead": float(status.dead),
            "queue/duplicates": float(status.duplicates),
        }

    def position(self) -> QueuePosition:
        """Where the queue stands, for a checkpoint."""
        with self._redis():
            self._mark()
            position = self._queue.position()
            self._contained = self._queue.delivered()
        return position

    def acknowledge(self) -> None:
        """A checkpoint with the last `position` is written."""
        with self._redis():
            self._queue.ack_delivered(self._contained)

    def expire(self) -> None:
        """Have Redis forget the queue of a finished run in a week; while it is away, say so."""
        try:
            with self._redis():
                self._queue.expire(_KEPT_S)
        except RetryableError as error:
            self._display.line(f"the prompt queue stays in Redis: {error}")

    def _mark(self) -> None:
        for batch, entry_ids in list(self._unmarked.items()):
            self._queue.mark_delivered(entry_ids, batch)
            del self._unmarked[batch]

    @contextlib.contextmanager
    def _redis(self) -> Iterator[None]:
        try:
            with redis_errors(self.source.url):
                yield
        except QueueLost as error:
            try:
                with redis_errors(self.source.url):
                    self._queue.remember(self._seen, self._duplicates)
            except RetryableError as away:
                self._display.line(f"duplicates will not be known as such: {away}")
            raise LostPart(str(error)) from error
