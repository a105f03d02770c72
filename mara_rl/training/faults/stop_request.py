"""Ctrl-C and SIGTERM: a run saves itself at the next safe point and ends."""

import contextlib
import signal
from typing import Any, Self

from mara_rl.common.display import Display


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; what training had done by then is in a checkpoint.

    Attributes:
        status: the exit status that tells so, 130 after Ctrl-C and 143 after SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


class StopRequest(contextlib.ExitStack):
    """Notes Ctrl-C and SIGTERM for the length of a ``with`` block; `check` is for safe points.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display
        self._asked: int | None = None

    def __enter__(self) -> Self:
        self.listen()
        return super().__enter__()

    def listen(self) -> None:
        """Take the signals (back): Ray, when it starts, takes SIGTERM for itself."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) != self._note:
                self.callback(signal.signal, signum, signal.signal(signum, self._note))

    def check(self) -> None:
        """Raise Interrupted where a stop was asked for."""
        if self._asked is not None:
            raise Interrupted(self._asked)

    def _note(self, signum: int, frame: Any) -> None:
        if self._asked is None:
            self._asked = signum
            hint = "; press Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
            self._display.line(f"stopping at the next safe point{hint}")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
