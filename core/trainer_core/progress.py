"""What a run shows: lines, and a live bar where there is a terminal."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

PLAIN_INTERVAL_S = 10.0
GIB = 1 << 30
SPACE = "  "


class Display:
    """Writes for the user. In a terminal long work has a bar; elsewhere it has plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, file=sys.stdout)
        self._lock = threading.Lock()

    @classmethod
    def silent(cls) -> Display:
        """Return one that shows nothing."""
        return cls(Console(file=io.StringIO()))

    def say(self, message: str) -> None:
        """Show a line (above the bar, if there is one)."""
        with self._lock:
            if self.console.is_terminal:
                self.console.print(message, markup=False, emoji=False)
            else:  # the same line, without the work of laying it out
                self.console.file.write(f"{message}\n")
                self.console.file.flush()

    @contextmanager
    def task(
        self, title: str, total: int, *, start: int = 0, every: int | None = None
    ) -> Iterator[Callable[..., None]]:
        """Show work of ``total`` parts; the block calls ``advance(n, note)`` as they get done.

        every: without a terminal, a line every so many parts; every ten seconds by default.
        """
        if self.console.is_terminal:
            with self._bar(title, total, start) as advance:
                yield advance
        else:
            yield self._lines(title, total, start, every)

    @contextmanager
    def _bar(self, title: str, total: int, start: int) -> Iterator[Callable[..., None]]:
        whole = Column(no_wrap=True)
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            _NoteColumn(table_column=rest),
        )
        with Progress(*columns, console=self.console, expand=True) as progress:
            task = progress.add_task(title, total=total, completed=start, note="")

            def advance(parts: int = 1, note: str | None = None) -> None:
                fields: dict[str, Any] = {} if note is None else {"note": note}
                progress.update(task, advance=parts, **fields)

            yield advance

    def _lines(self, title: str, total: int, start: int, every: int | None) -> Callable[..., None]:
        done, last_line = start, time.monotonic()

        def advance(parts: int = 1, note: str | None = None) -> None:
            nonlocal done, last_line
            done += parts
            now = time.monotonic()
            due = done % every == 0 if every else now - last_line >= PLAIN_INTERVAL_S
            if due or done == total:
                last_line = now
                self.say(f"{title} {done}/{total}" + (f"  {note}" if note else ""))

        return advance


@dataclass(frozen=True)
class Fitting:
    """Parts of a note; as many of them as the line has room for, the first ones first."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self.text.split(SPACE)
        while len(parts) > 1 and cell_len(SPACE.join(parts)) > options.max_width:
            parts.pop()
        yield Text(SPACE.join(parts), no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, cell_len(self.text)).with_maximum(options.max_width)


class _NoteColumn(ProgressColumn):
    def render(self, task: Task) -> Fitting:
        return Fitting(task.fields["note"])


def step_note(scalars: dict[str, float], timing: dict[str, float]) -> str:
    """Return the figures beside the bar."""
    parts = [f"loss {scalars['loss']:.4f}", f"lr {scalars['lr']:.2e}"]
    if timing:
        parts.append(f"{timing['s_per_step']:.2f} s/step")
        if timing.get("tokens_per_s"):
            parts.append(f"{timing['tokens_per_s']:.0f} tokens/s")
        parts.append(f"{timing['peak_bytes'] / GIB:.2f} GiB")
    return SPACE.join(parts)
