"""The event log, and a worker thread that feeds the trackers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_core.errors import TrainerError
from trainer_core.types import Record

Tracker = tuple[str, Callable[[Record], None]]


class EventLog:
    """``events.jsonl``: one JSON object a line; the same run writes the same lines.

    Wall-clock figures go to lines of kind "timing" only, so that all others can be compared.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab")

    def write(self, kind: str, **fields: Any) -> None:
        """Append an event."""
        self._file.write((json.dumps({"kind": kind, **fields}, ensure_ascii=False) + "\n").encode())

    def flush(self) -> int:
        """Force the log to the disk; return its size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, size_bytes: int) -> None:
        """Drop all that was written after the log had this size, such as by steps that were lost."""
        self._file.flush()
        if size_bytes < self.path.stat().st_size:
            self._file.truncate(size_bytes)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Flush and close; closed even if the disk is full."""
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # the flush has told it
                self._file.close()


class Trackers:
    """Hands records to every tracker from one worker thread; a failing one is reported and dropped."""

    def __init__(self, trackers: Sequence[Tracker], *, say: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._say = say
        self._queue: queue.Queue[Record | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if self._trackers:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record; returns at once."""
        if self._thread is not None:
            self._queue.put(record)

    def end(self, step: int, *, timeout_s: float = 60.0) -> None:
        """Tell the trackers that the run ends, let the queue run dry and stop the thread."""
        if self._thread is not None:
            self._queue.put(Record("end", step=step))
            self._queue.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._say("a tracker did not finish in time; its last records may be missing")

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            for tracker in list(self._trackers):
                self._give(tracker, record)

    def _give(self, tracker: Tracker, record: Record) -> None:
        name, track = tracker
        try:
            track(record)
        except Exception as error:  # a tracker never stops training
            self._trackers.remove(tracker)
            self._say(
                f"tracker {name} failed at {record.kind} of step {record.step} and is off from here "
                f"on; training goes on. {type(error).__name__}: {error}"
            )


@dataclass(frozen=True)
class Row:
    """The scalars of one step and the names of its samples."""

    step: int
    scalars: dict[str, float]
    sample_ids: Sequence[str]


class Meter:
    """Scalars that stay on the device until they are read together."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Any], Sequence[str]]] = []

    def add(self, step: int, scalars: Mapping[str, Any], sample_ids: Sequence[str]) -> None:
        """Keep the scalars of a step: 0-d tensors or numbers."""
        self._steps.append((step, dict(scalars), sample_ids))

    def read(self) -> list[Row]:
        """Return the scalars since the last reading, by step; one host synchronisation."""
        import torch

        if not self._steps:
            return []
        flat = [v for _, scalars, _ in self._steps for v in scalars.values()]
        tensors = [v.detach().float() for v in flat if isinstance(v, torch.Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])  # host sync
        steps, self._steps = self._steps, []
        return [
            Row(
                step,
                {
                    name: next(numbers) if isinstance(value, torch.Tensor) else float(value)
                    for name, value in scalars.items()
                },
                sample_ids,
            )
            for step, scalars, sample_ids in steps
        ]


def check_finite(row: Row) -> None:
    """Raise TrainerError that names step, scalar and samples where a value is not finite."""
    bad = [name for name, value in row.scalars.items() if not math.isfinite(value)]
    if bad:
        raise TrainerError(
            f"step {row.step}: {', '.join(bad)} is not finite; samples: {', '.join(row.sample_ids)}. "
            "Nothing was saved after it: the same command goes on from the checkpoint before it, if "
            "there is one. Lower learning_rate or max_grad_norm, or look at these samples."
        )
