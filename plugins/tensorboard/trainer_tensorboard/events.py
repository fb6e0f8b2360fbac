"""The event file of one run. Knows nothing of the trainer."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_tensorboard.preview import Preview

NAME = re.compile(r"tfevents\.(\d+)\.")
TEXT_LIMIT = 200
"""Characters of a hyperparameter's value; TensorBoard's table gets unreadable beyond."""


class EventFile:
    """Appends to a TensorBoard folder.

    purge_step: events of earlier files at this step and after it are hidden: a resumed run does
    those steps again. Closed at the end of the process if nobody closed it.
    """

    def __init__(self, folder: Path, *, purge_step: int | None, flush_s: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=flush_s)
        self._close = weakref.finalize(self, self._writer.close)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers under their names."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def settings(self, values: Mapping[str, Any], step: int) -> None:
        """Write the settings as a table and as hyperparameters of the run."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("settings", table(values), step)
        # Of the three summaries only the start is written: without a list of metrics TensorBoard
        # takes every scalar of the run, which no one has to name in advance.
        _, start, _ = hparams({name: plain(value) for name, value in values.items()}, {})
        self._writer.file_writer.add_summary(start, step)
        self.flush()

    def image(self, name: str, preview: Preview, *, step: int, caption: str) -> None:
        """Write an encoded image, with a caption behind its information mark."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        image = Summary.Image(
            encoded_image_string=preview.data,
            width=preview.width,
            height=preview.height,
            colorspace=3,
        )
        about = SummaryMetadata(display_name=name, summary_description=caption)
        value = Summary.Value(tag=name, image=image, metadata=about)
        self._writer.file_writer.add_summary(Summary(value=[value]), step)

    def flush(self) -> None:
        """Bring all events to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close; a second time does nothing."""
        self._close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, for a second at most, until a new event file sorts behind all that are there.

    TensorBoard reads the files of a folder in the order of their names, which hold the time in whole
    seconds; of two of one second, the later could be read first and its purge would hide nothing.
    """
    seconds = [int(found[1]) for path in folder.glob("*") if (found := NAME.search(path.name))]
    late = max(seconds, default=0) + 1 - time.time()
    if 0 < late <= 1:
        time.sleep(late)


def plain(value: Any) -> str | float:
    """Return a value of a kind that hyperparameters may have; truth as a word, not as 1."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"


def table(values: Mapping[str, Any]) -> str:
    """Return a Markdown table of names and values, sorted by name."""
    rows = [f"| {_cell(name)} | {_cell(values[name])} |" for name in sorted(values)]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace("|", "\\|")
    return " ".join(text.split())
