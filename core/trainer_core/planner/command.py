"""What ``trainer plan`` does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer_core import session
from trainer_core.blame import blame
from trainer_core.data import render_report
from trainer_core.errors import TrainerError
from trainer_core.faults import told
from trainer_core.planner.auto import Prepare
from trainer_core.planner.fit import Rung, ladder
from trainer_core.planner.rehearse import Forecast, forecast
from trainer_core.planner.report import as_json, lines, verdict
from trainer_core.progress import Display
from trainer_core.settings.load import located

SIDE, REPEATS = 2048, 5


def plan(prepare: Prepare, *, vram: float | None, tflops: float | None, to: Path | None) -> int:
    """Say what the run would need, whether it fits, and what would make it fit."""
    resolved, host = prepare({})
    with told(), blame(host), located(resolved):
        begun = session.prepare(resolved, host)
        render_report(begun.plan, begun.display.console, most_files=session.MOST_FILES)
        begun.display.say("Rehearsing one step without weights ...")
        found = forecast(begun.run, host)
    rate = tflops * 1e12 if tflops else measured_rate(begun.run.device, begun.run.placement.dtype)
    for line in lines(found, begun.run, rate=rate, measured=tflops is None):
        begun.display.say(line)
    rungs: list[Rung] = []
    if vram is not None:
        rungs = list(
            ladder(
                found,
                capacity=vram * 2**30,
                current=lambda key: getattr(resolved.core, key, None),
                forecast=lambda keys, encoders: _other(prepare, keys, None if encoders else found),
            )
        )
        for line in verdict(found, vram=vram, rungs=rungs):
            begun.display.say(line)
    if to is not None:
        to.write_text(json.dumps(as_json(found, rate=rate, rungs=rungs), indent=2) + "\n", "utf-8")
        begun.display.say(f"Written to {to}")
    return 0


def _other(prepare: Prepare, keys: Mapping[str, Any], known: Forecast | None) -> Forecast | None:
    """Return what the run would need with other values; None where they are refused."""
    try:
        resolved, host = prepare(keys)
        with told(), blame(host), located(resolved):
            begun = session.prepare(resolved, host, display=Display.silent())
            return forecast(begun.run, host, known=known)
    except TrainerError:
        return None


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of plain products on this device."""
    if device.type == "cpu":
        dtype = torch.float32  # what a CPU is used with; its bfloat16 is a slow path
    side = SIDE if device.type == "cpu" else 4 * SIDE
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        c = a @ b
        float(c[0, 0])  # host sync: the product is done
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
