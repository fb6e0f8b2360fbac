"""Runs three real steps and compares them with the forecast: ``trainer plan --probe``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_core import session
from trainer_core.distributed import begin_peak, peak_bytes
from trainer_core.planner.rehearse import Forecast
from trainer_core.planner.report import gib, readable

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.settings.load import Resolved

STEPS = 3
FOLDER = "plan-probe"
QUIET: Mapping[str, Any] = {
    "max_train_steps": STEPS,
    "num_train_epochs": 0,
    "lr_warmup_steps": 0,
    "checkpoint_step_interval": 0,
    "validation_step_interval": 0,
    "eval_steps_interval": 0,
    "log_step_interval": 1,
    "report_to": "none",
    "resume_from_checkpoint": "none",
}
"""What makes a run short; samples and trackers are left out."""


@dataclass(frozen=True)
class Measured:
    """peak: bytes of the device, of the process on a CPU. base: bytes before anything was loaded.
    seconds: of the last step.
    """

    peak: int
    base: int
    seconds: float

    @property
    def grown(self) -> int:
        """Bytes that the run added."""
        return self.peak - self.base


def probe(
    prepare: Callable[[Mapping[str, Any]], tuple[Resolved, Host]],
    output: Path,
    device: torch.device,
) -> Measured:
    """Train three steps below ``output`` and remove what they wrote; the caches stay."""
    folder = output / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    base = begin_peak(device)
    resolved, host = prepare({**QUIET, "output_dir": str(folder)})
    try:
        session.run(resolved, host)
        lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    timing = [event for event in map(json.loads, lines) if event["kind"] == "timing"]
    return Measured(peak_bytes(device), base, float(timing[-1]["s_per_step"]))


def compared(found: Forecast, measured: Measured, *, rate: float) -> Iterator[str]:
    """Yield the forecast beside what was measured."""
    foretold = found.peak.num_bytes
    yield (
        f"Probe of {STEPS} steps: memory {gib(measured.grown).strip()} above the "
        f"{gib(measured.base).strip()} at the start, foretold {gib(foretold).strip()} "
        f"({_error(foretold, measured.grown)})."
    )
    seconds = found.operations / rate
    yield (
        f"  a step {readable(measured.seconds)}, foretold {readable(seconds)} "
        f"({_error(seconds, measured.seconds)}): plain products are the most that a step can reach."
    )


def _error(foretold: float, measured: float) -> str:
    return f"{(foretold - measured) / measured:+.0%}" if measured > 0 else "nothing to compare"
