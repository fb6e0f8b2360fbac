"""What the trainer sees of the plugin: a tracker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.hookspecs import hookimpl
from trainer_core.types import PluginInfo, Record
from trainer_tensorboard.config import FLUSH_S, PREVIEW_EDGE

if TYPE_CHECKING:
    from trainer_core.run import Run
    from trainer_tensorboard.events import EventFile


class Tensorboard:
    """Writes scalars, samples and settings below ``<output_dir>/tensorboard``."""

    info = PluginInfo(
        summary="TensorBoard: scalars, samples and settings",
        values=("report_to=tensorboard",),
    )

    def __init__(self, settings: None = None) -> None:
        self._events: EventFile | None = None

    @hookimpl
    def track(self, run: Run, record: Record) -> None:
        """Append a record to the run's event file."""
        if record.kind == "end":
            self._end()
            return
        if record.kind == "start":
            self._end()
            # From the checkpoint's step on everything is reported again, that step included.
            self._events = self._open(run, purge_step=record.step)
        events = self._events = self._events or self._open(run, purge_step=None)
        if record.kind == "start":
            events.settings(record.settings, record.step)
        elif record.kind == "scalars":
            events.scalars(record.scalars, record.step)
        else:
            self._media(events, record)

    def _media(self, events: EventFile, record: Record) -> None:
        from trainer_tensorboard.preview import preview

        for name, path in record.files.items():
            shown = preview(path, longest_edge=PREVIEW_EDGE)
            caption = record.captions.get(name, "")
            events.image(f"samples/{name}", shown, step=record.step, caption=caption)
        events.flush()

    def _open(self, run: Run, *, purge_step: int | None) -> EventFile:
        from trainer_tensorboard.events import EventFile

        return EventFile(folder(run), purge_step=purge_step, flush_s=FLUSH_S)

    def _end(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def folder(run: Run) -> Path:
    """Return where the run's event files lie; a resumed run finds the same place."""
    project = run.settings.tracker_project_name
    name = run.settings.tracker_run_name or run.output_dir.resolve().name
    return run.output_dir / "tensorboard" / _safe(project) / _safe(name)


def _safe(name: str) -> str:
    # A name is one folder: no separators, and neither "." nor "..".
    return re.sub(r"[^\w .+=,@-]", "_", name).strip(". ") or "run"
