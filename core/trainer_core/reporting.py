"""Figures of the steps: kept on the device, read together, written and shown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer_core.distributed import peak_bytes
from trainer_core.metrics import Row, check_finite
from trainer_core.progress import step_note
from trainer_core.reach import check_reach
from trainer_core.training import num_tokens
from trainer_core.types import Batch, Record

if TYPE_CHECKING:
    from trainer_core.training import Training


class Reporter:
    """Writes each step to the event log and the trackers, in one go every ``log_step_interval``."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._seconds = 0.0
        self._steps = 0
        self._tokens = 0
        self._mark = 0.0

    def start_step(self) -> None:
        """Start the clock; what happens between steps (checkpoints, samples) does not count."""
        coming = self.training.step + 1
        self.training.costs.on = self._is_due(coming) or coming == self.training.total_steps
        self._mark = time.monotonic()

    def end_step(
        self, group: Sequence[Batch], scalars: Mapping[str, Any], *, flush: bool
    ) -> str | None:
        """Keep a step's scalars; at the interval or with ``flush`` read all and return a note."""
        training = self.training
        check_reach(training)
        names = [name for batch in group for name in batch.sample_ids]
        training.meter.add(training.step, scalars, names)
        self._tokens += sum(num_tokens(training, batch.latents) for batch in group)
        self._steps += 1
        rows = training.meter.read() if self._is_due(training.step) or flush else []
        seconds = time.monotonic() - self._mark
        if training.costs.on:
            training.costs.step_done(seconds)
        self._seconds += seconds
        return self._write(rows) if rows else None

    def _is_due(self, step: int) -> bool:
        return step % self.training.run.settings.log_step_interval == 0

    def _write(self, rows: Sequence[Row]) -> str:
        training = self.training
        for row in rows:
            check_finite(row)
            training.events.write("step", step=row.step, **row.scalars)
            training.trackers.put(Record("scalars", step=row.step, scalars=row.scalars))
        last = rows[-1]
        timing = {
            "s_per_step": self._seconds / self._steps,
            "tokens_per_s": self._tokens / max(self._seconds, 1e-9),
            "peak_bytes": float(max(peak_bytes(training.run.device), training.costs.peak_seen)),
        }
        scalars = {**timing, **training.costs.scalars()}
        self._seconds, self._steps, self._tokens = 0.0, 0, 0
        training.events.write("timing", step=last.step, **scalars)
        training.trackers.put(Record("scalars", step=last.step, scalars=scalars))
        return step_note(last.scalars, timing)
