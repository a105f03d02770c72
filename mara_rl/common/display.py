"""Progress of a run for people: bars on a terminal, one line per phase elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Phase:
    """One phase of a run; `advance` it as work gets done."""

    def __init__(self, progress: Progress | None, name: str, total: int, done: int) -> None:
        self._progress = progress
        self._started_s = time.monotonic()
        self._done, self._first = done, done
        if progress is not None:
            self._task = progress.add_task(name, total=total, completed=done, rate="", note="")

    def advance(self, amount: int, note: str = "") -> None:
        """``amount`` more is done; ``note`` replaces the figures shown beside the bar."""
        self._done += amount
        if self._progress is not None:
            rate = (self._done - self._first) / max(1e-9, time.monotonic() - self._started_s)
            fields: dict[str, Any] = {
                "rate": f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
            }
            if note:
                fields["note"] = note
            self._progress.update(self._task, advance=amount, **fields)


class Display:
    """Where a run shows itself. Keeps the seconds of every phase in ``phase_s``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase_s: dict[str, float] = {}

    def line(self, text: str) -> None:
        """One plain line, neither wrapped nor coloured."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    @contextlib.contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        """Show a phase of ``total`` pieces of work while the context lasts."""
        started_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            progress = None
            if self.console.is_terminal:
                progress = stack.enter_context(
                    Progress(
                        TextColumn("{task.description}"),
                        BarColumn(bar_width=24),
                        MofNCompleteColumn(),
                        TextColumn("{task.fields[rate]}"),
                        TimeElapsedColumn(),
                        TimeRemainingColumn(),
                        TextColumn("{task.fields[note]}"),
                        console=self.console,
                        transient=True,
                    )
                )
            yield Phase(progress, name, total, done)
        seconds = time.monotonic() - started_s
        self.phase_s[name] = self.phase_s.get(name, 0.0) + seconds
        self.line(f"{name}: {seconds:.1f} s")
