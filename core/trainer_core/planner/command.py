"""What ``trainer plan`` does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_core import session
from trainer_core.blame import blame
from trainer_core.data import render_report
from trainer_core.errors import ConfigError, Problem, TrainerError
from trainer_core.faults import told
from trainer_core.planner.auto import Prepare
from trainer_core.planner.fit import GIB, Rung, ladder
from trainer_core.planner.probe import compared, probe
from trainer_core.planner.rehearse import Forecast, Shape, forecast
from trainer_core.planner.report import as_json, lines, verdict
from trainer_core.progress import Display
from trainer_core.settings.load import located

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.run import Run
    from trainer_core.settings.load import Resolved

SIDE, REPEATS = 2048, 5
CLIP = re.compile(r"(\d+)x(\d+)x(\d+)")


def plan(
    prepare: Prepare,
    *,
    clip: str | None = None,
    vram: float | None = None,
    tflops: float | None = None,
    to: Path | None = None,
    with_probe: bool = False,
) -> int:
    """Say what the run would need, whether it fits, and what would make it fit.

    clip: "81x480x832", frames, height and width, instead of the data's largest one. vram: GiB.
    """
    resolved, host = prepare({})
    display = Display()
    with told(), blame(host), located(resolved):
        current = _described(resolved, host, display, clip)
        display.say("Rehearsing one step without weights ...")
        found = forecast(current, host)
    rate = tflops * 1e12 if tflops else measured_rate(current.device, current.placement.dtype)
    for line in lines(found, current, rate=rate, measured=tflops is None):
        display.say(line)
    rungs: list[Rung] = []
    if vram is not None:

        def other(keys: Mapping[str, Any], encoders: bool) -> Forecast | None:
            return _other(prepare, keys, clip, None if encoders else found)

        core = resolved.resolved()
        rungs = list(ladder(found, capacity=vram * GIB, current=core.get, forecast=other))
        for line in verdict(found, vram=vram, rungs=rungs):
            display.say(line)
    if to is not None:
        to.write_text(json.dumps(as_json(found, rate=rate, rungs=rungs), indent=2) + "\n", "utf-8")
        display.say(f"Written to {to}")
    if with_probe:
        for line in compared(found, probe(prepare, current.output_dir, current.device), rate=rate):
            display.say(line)
    return 0


def _described(resolved: Resolved, host: Host, display: Display, clip: str | None) -> Run:
    """Return the run's context, with the shapes of its clips."""
    if clip is None:
        begun = session.prepare(resolved, host, display=display)
        render_report(begun.plan, display.console, most_files=session.MOST_FILES)
        return begun.run
    current = session.describe(resolved, host, display)
    current.clip_shapes = {_shape(clip, current): 1}
    current.most_tokens = current.spec.tokens(*_shape(clip, current))
    return current


def _shape(clip: str, current: Run) -> Shape:
    """Return (frames, height, width) that ``--clip`` names, or refuse what the model does not take."""
    found = CLIP.fullmatch(clip)
    spec = current.spec
    if found is not None:
        frames, height, width = (int(number) for number in found.groups())
        fits = height % spec.alignment == 0 and width % spec.alignment == 0 and height * width > 0
        if fits and frames and frames == spec.snap_frames(frames):
            return frames, height, width
    text = (
        f"must be FRAMESxHEIGHTxWIDTH, frames {spec.frame_stride} n + 1, height and width multiples of "
        f"{spec.alignment}."
    )
    raise ConfigError([Problem("--clip", text, clip, "command line", "Such as 81x480x832.")])


def _other(
    prepare: Prepare, keys: Mapping[str, Any], clip: str | None, known: Forecast | None
) -> Forecast | None:
    """Return what the run would need with other values; None where they are refused."""
    try:
        resolved, host = prepare(keys)
        with told(), blame(host), located(resolved):
            current = _described(resolved, host, Display.silent(), clip)
            return forecast(current, host, known=known)
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
