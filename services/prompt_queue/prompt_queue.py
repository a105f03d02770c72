"""A named queue of prompts on a Redis stream: at-least-once delivery, epochs in seeded order."""

import contextlib
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import redis
from pydantic import BaseModel, Field

from envs.protocols import Prompt
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.prompts.prompt_files import PromptRecord
from services.prompt_queue import prompt_scripts
from services.prompt_queue.prompt_epochs import QueuePosition, Ticket, epoch_order, rank

GROUP = "train"
_DELIVERED = "@delivered"
_RETURNED = "@returned"
_POLL_S = 0.1
_PIECE = 500  # stream entries in one reply


class QueueLost(RetryableError):
    """Redis has lost the queue: the run has to build it again from a checkpoint."""


class ConsumerStatus(NamedTuple):
    """A reader: the entries it holds and the seconds since its last sign of life."""

    pending: int
    silent_s: float


class QueueStatus(BaseModel):
    """A queue in figures."""

    queue: str
    prompts: int = Field(description="prompts in the catalogue")
    epoch: int = Field(description="newest epoch in the stream; -1 before the first")
    waiting: int = Field(description="entries that no reader holds")
    pending: dict[str, ConsumerStatus] = Field(description="readers and what they hold")
    delivered: int = Field(description="reached the learner, not yet in a checkpoint")
    dead: int = Field(description="dead letters")
    duplicates: int = Field(description="episodes that reached the learner again")


class PromptQueue:
    """A catalogue of prompts and the stream of entries made from it, one epoch after another.

    An entry is read by one consumer, stays pending with it while the answer is generated, is marked
    delivered when its episode reached the learner, and leaves with `ack_delivered` once a
    checkpoint holds its update. Whatever happens in between, it is handed out again. One run at a
    time trains from a queue, with any number of consumers.

    Redis' own errors pass through; `services.cluster.redis_server.redis_errors` translates them.

    Args:
        client: a client that decodes responses (`services.cluster.redis_server.connect`).
        name: letters, digits, ``_ . -``.
        seed: orders the epochs.
        max_failures: an entry whose episode failed this often becomes a dead letter.
        max_deliveries: so does one held by this many consumers that died.
        create: make the queue where there is none. Readers must not: in one that they made after
            Redis lost its data they would wait for prompts, instead of telling of the loss.
    """

    def __init__(
        self,
        client: redis.Redis,
        name: str = "default",
        *,
        seed: int = 0,
        max_failures: int = 3,
        max_deliveries: int = 5,
        create: bool = True,
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise ConfigError(
                f"queue name {name!r}: expected letters, digits, '_', '.' and '-' only"
            )
        self.name = name
        self._client: Any = client  # typed, every reply would be "bytes or str"; it decodes
        self._seed = seed
        self._max_failures = max_failures
        self._max_deliveries = max_deliveries
        # The braces put all keys of a queue in one slot of a Redis cluster.
        names = ("stream", "catalogue", "meta", "alive", "arrived", "dead", "withdrawn", "repeats")
        keys = [f"mara:{{{name}}}:{key}" for key in names]
        self._stream, self._catalogue, self._meta, self._alive = keys[:4]
        self._arrived, self._dead, self._withdrawn, self._repeats = keys[4:]
        self._keys, self._script_keys = keys, keys[:7]
        self._scripts: dict[str, Any] = {}
        self._generation = ""
        if create:
            try:
                client.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    @staticmethod
    def exists(client: redis.Redis, name: str) -> bool:
        """Whether there is a queue of this name; making a `PromptQueue` would make one."""
        return bool(client.exists(f"mara:{{{name}}}:stream"))

    # Prompts in -----------------------------------------------------------------------------------

    def push(self, prompts: Iterable[PromptRecord], *, repeats: int = 1) -> int:
        """Add prompts to the catalogue; they take part from the next epoch on.

        A prompt already there is not added again, only its ``repeats`` (entries an epoch) change.
        Returns the number of new ones. Raises DataError where an id already names another text.
        """
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}, expected at least 1")
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        if not texts:
            return 0
        known = self._client.hmget(self._catalogue, list(texts))
        for (prompt_id, text), old in zip(texts.items(), known, strict=True):
            if old is not None and old != text:
                raise DataError(
                    f"prompt id {prompt_id!r} names another text in queue {self.name!r}: give "
                    "prompts of different files different ids, or use another queue"
                )
        with self._client.pipeline() as pipe:
            pipe.hset(self._catalogue, mapping=texts)
            pipe.hset(self._repeats, mapping=dict.fromkeys(texts, repeats))
            self._persist(pipe)
            pipe.execute()
        return known.count(None)

    def fill(self, epoch: int) -> int:
        """Append an epoch to the stream: every prompt of the catalogue × its repeats, in order.

        All or nothing, and once: returns the number of entries, 0 if this epoch was filled before
        (by whomever) or there are no prompts.
        """
        with self._client.pipeline() as pipe:
            pipe.watch(self._meta)
            if epoch <= int(pipe.hget(self._meta, "epoch") or -1):
                return 0
            tickets = self._epoch_tickets(epoch, self._client.smembers(self._withdrawn))
            if not tickets:
                return 0
            pipe.multi()
            self._append(pipe, tickets, ordered=True)
            pipe.hset(self._meta, "epoch", epoch)
            try:
                pipe.execute()
            except redis.WatchError:  # another reader was quicker
                return 0
        return len(tickets)

    def _epoch_tickets(self, epoch: int, withdrawn: set[str], frontier: str = "") -> list[Ticket]:
        repeats = {name: int(n) for name, n in self._client.hgetall(self._repeats).items()}
        for prompt_id in withdrawn:
            repeats.pop(prompt_id, None)
        return epoch_order(repeats, seed=self._seed, epoch=epoch, frontier=frontier)

    def _append(self, pipe: Any, tickets: Sequence[Ticket], *, ordered: bool) -> None:
        for ticket in tickets:
            fields = {
                "epoch": ticket.epoch,
                "prompt": ticket.prompt_id,
                "sample": ticket.sample,
                "failures": ticket.failures,
                "ordered": int(ordered),
            }
            pipe.xadd(self._stream, fields)

    # Reading --------------------------------------------------------------------------------------

    def read(self, consumer: str, count: int = 1, block_ms: int = 0) -> list[Prompt]:
        """Up to ``count`` entries, now pending with ``consumer``; [] if none comes in ``block_ms``.

        Entries that dead consumers held come first. When all are read the next epoch is filled, so
        a queue runs dry only while its catalogue is empty. Counts as a sign of life.
        """
        if consumer.startswith("@"):
            raise ConfigError(f"consumer name {consumer!r}: names with '@' are the queue's own")
        deadline = time.monotonic() + block_ms / 1000
        while True:
            epoch, rows = self._run("TAKE", consumer, count)
            if rows:
                return [self._prompt(row) for row in rows]
            # The epoch is that of the moment the stream was seen empty: filling the one after it is
            # right if nobody else has, and does nothing if somebody did.
            if self.fill(int(epoch) + 1) or self._epoch() > int(epoch):
                continue
            if time.monotonic() >= deadline:
                return []
            time.sleep(_POLL_S)

    def read_pending(self, consumer: str) -> list[Prompt]:
        """What ``consumer`` holds and has not delivered, oldest first; counts as no failure."""
        return [self._prompt(row) for row in self._run("HELD", consumer)]

    def beat(self, consumer: str) -> None:
        """A sign of life, for consumers that are busy with an answer."""
        seconds, micros = self._client.time()
        self._client.zadd(self._alive, {consumer: seconds * 1000 + micros // 1000})

    def release(self, consumer: str) -> int:
        """``consumer`` leaves; what it holds is handed out again. Returns how many that are."""
        return self._run("RELEASE", consumer)

    def reclaim(self, silent_ms: int) -> int:
        """Take the entries of consumers that gave no sign of life for ``silent_ms``.

        They are handed out again before unread ones, or become dead letters at ``max_deliveries``.
        Consumers that are slow but alive keep theirs. Returns the number taken.
        """
        return self._run("RECLAIM", silent_ms, self._max_deliveries)

    def _prompt(self, row: Sequence[str]) -> Prompt:
        entry_id, prompt_id, text = row
        if not text:
            raise DataError(f"queue {self.name!r} has lost the text of prompt {prompt_id!r}")
        return Prompt(text, prompt_id, entry_id)

    # Outcomes -------------------------------------------------------------------------------------

    def mark_delivered(self, entry_ids: Sequence[str], batch: str | None = None) -> int:
        """The episodes of these entries reached the learner. Returns the number newly delivered.

        The others, and those delivered before a restart, are counted as duplicates; not so when
        the client sends the command again because the reply to it was lost, nor when its caller
        does with the same ``batch``, a name of its own for every other call.
        """
        return self._run("DELIVER", batch or uuid.uuid4().hex, *entry_ids) if entry_ids else 0

    def delivered(self) -> list[str]:
        """Ids of the entries that reached the learner and are not acked yet, oldest first."""
        count = self._client.xlen(self._stream)
        if not count:
            return []
        with self._present():
            rows = self._client.xpending_range(
                self._stream, GROUP, min="-", max="+", count=count, consumername=_DELIVERED
            )
        return [row["message_id"] for row in rows]

    def ack_delivered(self, entry_ids: Sequence[str]) -> int:
        """Remove entries whose update is in a committed checkpoint. Returns how many there were."""
        return self._run("ACK", *entry_ids) if entry_ids else 0

    def fail(self, entry_id: str, reason: str) -> str:
        """The episode of an entry failed: it is queued again at the end, or dead at max_failures.

        Returns "again", "dead", or "gone" (nobody works on that entry: nothing is done).
        """
        return self._run("FAIL", entry_id, reason, self._max_failures)

    def reject(self, entry_id: str, reason: str) -> str:
        """This entry can never be answered: a dead letter at once. Returns "dead" or "gone"."""
        return self._run("FAIL", entry_id, reason, 1)

    def withdraw(self, prompt_ids: Sequence[str], reason: str) -> int:
        """Prompts that no entry may be made of: dead letters at once. Returns how many are new."""
        return self._run("WITHDRAW", reason, *prompt_ids) if prompt_ids else 0

    def requeue_dead(self) -> int:
        """Put dead letters back at the end of the stream and their prompts into later epochs."""
        return self._run("REQUEUE_DEAD")

    def dead_letters(self) -> list[dict[str, str]]:
        """Each: prompt, text, reason, failures, deliveries, epoch, sample."""
        return [fields for _, fields in self._client.xrange(self._dead)]

    # Checkpoints ----------------------------------------------------------------------------------

    def position(self) -> QueuePosition:
        """What is unfinished now, delivered entries counting as finished. For the checkpoint.

        Entries of prompts that are dead letters are not: they will not be handed out.
        """
        delivered = set(self.delivered())
        withdrawn = self._client.smembers(self._withdrawn)
        with self._present():
            last_read = _id_key(self._client.xinfo_groups(self._stream)[0]["last-delivered-id"])
        epoch = self._epoch()
        head: list[Ticket] = []
        tail: list[Ticket] = []
        frontier = None
        for entry_id, fields in self._entries():
            ticket = _ticket(fields)
            if ticket.prompt_id in withdrawn:
                continue
            unread = _id_key(entry_id) > last_read
            if unread and fields["ordered"] == "1" and ticket.epoch == epoch:
                frontier = rank(ticket, self._seed)
                break
            if entry_id not in delivered:
                head.append(ticket)
        if frontier is not None:
            # From here on all is the epoch in order, but for what was queued again behind it.
            for _, fields in self._entries(backwards=True):
                if fields["ordered"] == "1":
                    break
                if fields["prompt"] not in withdrawn:
                    tail.insert(0, _ticket(fields))
        return QueuePosition(
            epoch=epoch,
            seed=self._seed,
            prompts=self._client.hlen(self._catalogue),
            head=head,
            frontier=frontier,
            tail=tail,
            withdrawn=sorted(withdrawn),
            duplicates=int(self._client.hget(self._meta, "duplicates") or 0),
        )

    def _entries(self, *, backwards: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
        """The stream's entries, fetched in pieces."""
        bound = "+" if backwards else "-"
        while True:
            if backwards:
                piece = self._client.xrevrange(self._stream, max=bound, count=_PIECE)
            else:
                piece = self._client.xrange(self._stream, min=bound, count=_PIECE)
            if not piece:
                return
            yield from piece
            bound = f"({piece[-1][0]}"

    def expire(self, after_s: int) -> None:
        """Let Redis forget the queue then, unless `push` or `restart` take it into use again."""
        with self._client.pipeline() as pipe:
            for key in self._keys:
                pipe.expire(key, after_s)
            pipe.execute()

    def _persist(self, pipe: Any) -> None:
        for key in self._keys:
            pipe.persist(key)

    def restart(self, position: QueuePosition | None = None) -> None:
        """Build the stream anew: from ``position``, or with None from before the first epoch.

        Nothing is pending or delivered afterwards; entries delivered since ``position`` come again,
        and count as duplicates when they do; so do prompts that became dead letters since then.
        Catalogue and older dead letters stay. This works the same on a Redis that has lost its
        data, once its prompts were pushed again, save that dead letters are gone (their prompts
        stay out): raises DataError when the catalogue has fewer than at ``position``, ConfigError
        when the seed is another.
        """
        withdrawn = self._client.smembers(self._withdrawn)
        later: set[str] = set()
        if position is not None:
            self._check(position)
            later = withdrawn - set(position.withdrawn)
            withdrawn -= later
            if not self._client.hexists(self._meta, "generation"):
                withdrawn |= set(position.withdrawn)
        letters = self._client.xrange(self._dead) if later else []
        letter_ids = [letter_id for letter_id, fields in letters if fields["prompt"] in later]
        self._generation = uuid.uuid4().hex
        with self._client.pipeline() as pipe:
            self._persist(pipe)
            pipe.delete(self._stream, self._alive)
            pipe.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
            if later:
                pipe.srem(self._withdrawn, *later)
            if withdrawn:
                pipe.sadd(self._withdrawn, *withdrawn)
            if letter_ids:
                pipe.xdel(self._dead, *letter_ids)
            if position is None:
                pipe.delete(self._meta, self._arrived)
            else:
                pipe.hset(self._meta, "epoch", position.epoch)
                pipe.hsetnx(self._meta, "duplicates", position.duplicates)
                head, tail = (
                    [ticket for ticket in tickets if ticket.prompt_id not in withdrawn]
                    for tickets in (position.head, position.tail)
                )
                self._append(pipe, head, ordered=False)
                if position.frontier is not None:
                    rest = self._epoch_tickets(position.epoch, withdrawn, position.frontier)
                    self._append(pipe, rest, ordered=True)
                self._append(pipe, tail, ordered=False)
            pipe.hset(self._meta, "generation", self._generation)
            pipe.execute()

    def check_present(self) -> None:
        """Raise QueueLost unless the queue is the one this object built with `restart`."""
        if self._client.hget(self._meta, "generation") != self._generation:
            raise self._lost()

    def seen(self) -> list[str]:
        """What reached the learner and is in no checkpoint yet, for `remember`."""
        return list(self._client.hkeys(self._arrived))

    def remember(self, seen: Sequence[str], duplicates: int) -> None:
        """Put back what tells duplicates, `seen` and their count, after Redis lost its data."""
        with self._client.pipeline() as pipe:
            if seen:
                pipe.hset(self._arrived, mapping=dict.fromkeys(seen, "before"))
            pipe.hset(self._meta, "duplicates", duplicates)
            pipe.execute()

    @contextlib.contextmanager
    def _present(self) -> Iterator[None]:
        try:
            yield
        except redis.ResponseError as error:
            if "NOGROUP" in str(error) or "no such key" in str(error):
                raise self._lost() from error
            raise

    def _lost(self) -> QueueLost:
        return QueueLost(f"queue {self.name!r} is missing from Redis")

    def _check(self, position: QueuePosition) -> None:
        if position.seed != self._seed:
            raise ConfigError(
                f"seed of queue {self.name!r} is {self._seed}, the checkpoint's {position.seed}"
            )
        prompts = self._client.hlen(self._catalogue)
        if prompts < position.prompts:
            raise DataError(
                f"queue {self.name!r} has {prompts} prompts, the checkpoint's {position.prompts}: "
                "push the prompt file again"
            )

    # Figures --------------------------------------------------------------------------------------

    def status(self) -> QueueStatus:
        """The queue in figures, read in one step."""
        with self._client.pipeline() as pipe:
            pipe.hlen(self._catalogue).xlen(self._stream).xlen(self._dead)
            pipe.hgetall(self._meta).xpending(self._stream, GROUP).time()
            pipe.zrange(self._alive, 0, -1, withscores=True)
            with self._present():
                prompts, entries, dead, meta, pending, (seconds, _), alive = pipe.execute()
        counts = {row["name"]: row["pending"] for row in pending["consumers"]}
        delivered, returned = counts.pop(_DELIVERED, 0), counts.pop(_RETURNED, 0)
        silent_s = {name: max(0.0, seconds - beat / 1000) for name, beat in alive}
        names = sorted(counts.keys() | silent_s.keys())
        return QueueStatus(
            queue=self.name,
            prompts=prompts,
            epoch=int(meta.get("epoch", -1)),
            waiting=entries - pending["pending"] + returned,
            pending={
                name: ConsumerStatus(counts.get(name, 0), silent_s.get(name, float("inf")))
                for name in names
            },
            delivered=delivered,
            dead=dead,
            duplicates=int(meta.get("duplicates", 0)),
        )

    def _epoch(self) -> int:
        return int(self._client.hget(self._meta, "epoch") or -1)

    def _run(self, script: str, *args: str | int) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self._client.register_script(getattr(prompt_scripts, script))
        with self._present():
            return self._scripts[script](keys=self._script_keys, args=args)


def _ticket(fields: Mapping[str, str]) -> Ticket:
    return Ticket(
        int(fields["epoch"]), fields["prompt"], int(fields["sample"]), int(fields["failures"])
    )


def _id_key(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
