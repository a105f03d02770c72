"""A thread that steps a `Decoder`, for asyncio: requests in, growing answers out."""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from mara_rl.common.errors import RetryableError, first_line
from mara_rl.decoding.answer import DecodedAnswer, FinishReason, Growth, TokenTrace
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest


class QueueFullError(RetryableError):
    """As many answers wait as may."""


class LoopStoppedError(RetryableError):
    """The loop takes no requests any more: it drains, was stopped, or broke."""


@dataclass(frozen=True, slots=True)
class GrownToken:
    """A token taken; ``text`` is what became certain with it, ``trace`` only where asked for."""

    token_id: int
    text: str
    trace: TokenTrace | None


@dataclass(frozen=True, slots=True)
class AnswerGrowth:
    """What one step added to answer ``index`` of a group; the last one has a finish reason."""

    index: int
    tokens: list[GrownToken]
    finish_reason: FinishReason


class AnswerGroup:
    """Answers submitted together. Iterate over their growth; leaving early needs `cancel`.

    Attributes:
        answers: one a request; only complete ones (their last growth has come) may be read.
    """

    def __init__(self, owner: "DecodeLoop", requests: Sequence[DecodeRequest]) -> None:
        self.requests = list(requests)
        self.answers: list[DecodedAnswer] = []
        self.event_loop = asyncio.get_running_loop()
        self._owner = owner
        self._events: asyncio.Queue[AnswerGrowth | BaseException] = asyncio.Queue()
        self._open = len(self.requests)

    async def __aiter__(self) -> AsyncIterator[AnswerGrowth]:
        """Growth in the order it comes. Raises LoopStoppedError if the decoder breaks."""
        while self._open:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            if event.finish_reason:
                self._open -= 1
            yield event

    def cancel(self) -> None:
        """Free the slots of what is not complete. May be called at any time, more than once."""
        if self._open:
            self._open = 0
            self._owner.cancel(self)

    def put(self, event: AnswerGrowth | BaseException) -> None:
        """Hand over an event, from the thread of ``event_loop``."""
        self._events.put_nowait(event)


class DecodeLoop:
    """Owns a decoder: nobody else may touch it once `start` was called.

    Attributes:
        tokens, examined, looked: totals since the start, see `DecodedAnswer`, by kind of answer:
            "base" or "aligned".
        finished: answers by finish reason.
    """

    def __init__(
        self, decoder: Decoder, *, max_waiting: int, step_timeout_s: float = 120.0
    ) -> None:
        """
        Args:
            max_waiting: answers that may wait for a slot.
            step_timeout_s: a step that takes longer fails `check`.
        """
        self.num_slots = decoder.num_slots
        self.max_waiting = max_waiting
        self.tokens: Counter[str] = Counter()
        self.examined: Counter[str] = Counter()
        self.looked: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self._decoder = decoder
        self._step_timeout_s = step_timeout_s
        self._wake = threading.Condition()
        self._inbox: deque[tuple[bool, AnswerGroup]] = deque()  # (whether to start, group)
        self._running: dict[int, tuple[AnswerGroup, int, int]] = {}  # id of an answer: its place
        self._open = 0
        self._accepting = self._alive = True
        self._failure: str | None = None
        self._step_began_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    @property
    def in_use(self) -> int:
        """Slots taken."""
        return min(self._open, self.num_slots)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return max(0, self._open - self.num_slots)

    def start(self) -> None:
        """Begin to step the decoder. Once."""
        self._thread.start()

    def submit(self, requests: Sequence[DecodeRequest]) -> AnswerGroup:
        """Queue requests, all or none. Call it on the event loop that will read the group.

        Raises QueueFullError when they would have to wait beyond ``max_waiting``,
        LoopStoppedError when the loop takes none any more.
        """
        group = AnswerGroup(self, requests)
        with self._wake:
            if not self._accepting:
                raise LoopStoppedError(self._failure or "the server is shutting down")
            room = self.num_slots + self.max_waiting - self._open
            if len(requests) > room:
                raise QueueFullError(
                    f"{self.waiting} answers wait for {self.num_slots} slots; "
                    f"expected at most {self.max_waiting}"
                )
            self._open += len(requests)
            self._inbox.append((True, group))
            self._wake.notify()
        return group

    def cancel(self, group: AnswerGroup) -> None:
        """Free what a group holds, before the next step."""
        with self._wake:
            self._inbox.append((False, group))
            self._wake.notify()

    def check(self) -> None:
        """Raise RuntimeError when the thread broke or a step does not end."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        began_s = self._step_began_s
        if began_s is not None and time.monotonic() - began_s > self._step_timeout_s:
            raise RuntimeError(f"a decode step runs for over {self._step_timeout_s:g} s")

    def stop(self, *, drain_timeout_s: float = 0.0) -> None:
        """Take no more requests, let those there finish for so long, end the thread.

        What is not finished by then ends with LoopStoppedError. Blocks.
        """
        with self._wake:
            self._accepting = False
        deadline_s = time.monotonic() + drain_timeout_s
        while self._open and time.monotonic() < deadline_s and self._thread.is_alive():
            time.sleep(0.02)
        with self._wake:
            self._alive = False
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                if self._decoder.idle:  # all was cancelled
                    continue
                self._step_began_s = time.monotonic()
                growths = self._decoder.step()
                self._step_began_s = None
                self._publish(growths)
            error = LoopStoppedError("the server is shutting down")
        except Exception as failure:  # noqa: BLE001 - whatever it is, requests must not hang on it
            self._failure = f"decoding broke: {type(failure).__name__}: {first_line(failure)}"
            error = LoopStoppedError(self._failure)
            error.__cause__ = failure
        with self._wake:
            self._accepting = False
            self._step_began_s = None
            left = {group for group, _, _ in self._running.values()}
            left |= {group for begins, group in self._inbox if begins}
            self._running.clear()
            self._inbox.clear()
            self._open = 0
        _hand_over([(group, error) for group in left])

    def _take_in(self) -> bool:
        """Wait for something to do; start and cancel what the inbox says. False at the end."""
        with self._wake:
            while self._alive and not self._inbox and self._decoder.idle:
                self._wake.wait()
            if not self._alive:
                return False
            inbox, self._inbox = self._inbox, deque()
        for begins, group in inbox:
            if begins:
                group.answers = [self._decoder.submit(request) for request in group.requests]
                for index, answer in enumerate(group.answers):
                    self._running[id(answer)] = (group, index, 0)
                continue
            for answer in group.answers:
                if id(answer) in self._running:
                    self._decoder.cancel(answer)
                    self._forget(answer)
        return True

    def _publish(self, growths: Sequence[Growth]) -> None:
        """Give each answer that grew one event with all tokens of the step."""
        grown: dict[int, tuple[DecodedAnswer, list[GrownToken]]] = {}
        for growth in growths:
            answer = growth.answer
            tokens = grown.setdefault(id(answer), (answer, []))[1]
            if growth.token_id is None:
                continue
            group, index, number = self._running[id(answer)]
            self._running[id(answer)] = (group, index, number + 1)
            trace = answer.trace[number] if answer.trace is not None else None
            tokens.append(GrownToken(growth.token_id, growth.text, trace))
        events: list[tuple[AnswerGroup, AnswerGrowth | BaseException]] = []
        for key, (answer, tokens) in grown.items():
            group, index, _ = self._running[key]
            self.tokens[_kind(group.requests[index])] += len(tokens)
            if answer.finish_reason:
                self._forget(answer)
            events.append((group, AnswerGrowth(index, tokens, answer.finish_reason)))
        _hand_over(events)

    def _forget(self, answer: DecodedAnswer) -> None:
        """An answer is complete or cancelled."""
        group, index, _ = self._running.pop(id(answer))
        kind = _kind(group.requests[index])
        self.examined[kind] += answer.examined
        self.looked[kind] += answer.looked
        self.finished[answer.finish_reason] += 1
        with self._wake:
            self._open -= 1


def _kind(request: DecodeRequest) -> str:
    return "base" if request.blend is None else "aligned"


def _hand_over(events: Sequence[tuple[AnswerGroup, AnswerGrowth | BaseException]]) -> None:
    """Put events into their groups' queues, waking each event loop once."""
    by_loop: dict[
        asyncio.AbstractEventLoop, list[tuple[AnswerGroup, AnswerGrowth | BaseException]]
    ] = {}
    for group, event in events:
        by_loop.setdefault(group.event_loop, []).append((group, event))
    for event_loop, mine in by_loop.items():
        if not event_loop.is_closed():  # else nobody can be reading
            event_loop.call_soon_threadsafe(_put_all, mine)


def _put_all(events: Sequence[tuple[AnswerGroup, AnswerGrowth | BaseException]]) -> None:
    for group, event in events:
        group.put(event)
