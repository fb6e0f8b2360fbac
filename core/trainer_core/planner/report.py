"""Says what a forecast found, in lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainer_core.planner.fit import GIB, Rung, needed
from trainer_core.planner.rehearse import Forecast, Phase
from trainer_core.run import Run


def lines(found: Forecast, run: Run, *, rate: float, measured: bool) -> Iterator[str]:
    """Yield the report. rate: operations a second."""
    frames, height, width = found.clip
    others = len(run.clip_shapes) - 1
    among = f", the largest of {others + 1} sizes" if others else ""
    yield (
        f"Rehearsed: {frames} frames of {width}x{height}{among}; {found.tokens} video tokens in a "
        f"micro-batch of {run.settings.train_batch_size}; {found.trained:,} trained parameters."
    )
    yield "Device memory at the worst moment of each phase:"
    for phase in found.phases:
        yield f"  {gib(phase.num_bytes)}  {phase.name}: {parts(phase)}"
    if found.host:
        yield f"In host memory, and on the device only while they compute: {gib(found.host).strip()}."
    seconds, micro = found.operations / rate, run.settings.gradient_accumulation_steps
    source = "measured here" if measured else "given"
    yield (
        f"A step of such clips: {figures(found.operations / 1e12)} TFLOP, {readable(seconds)} at "
        f"{figures(rate / 1e12)} TFLOP/s ({source}), {figures(found.tokens * micro / seconds)} tokens a second."
    )
    sizes = ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in found.cache.items())
    yield f"Cache on the disk, at most: {sizes}."
    for sentence in found.unknown:
        yield f"Not known: {sentence}."


def verdict(found: Forecast, *, vram: float, rungs: Sequence[Rung]) -> Iterator[str]:
    """Yield whether it fits ``vram`` GiB, and what would make it fit."""
    need = needed(found)
    worst = found.peak.name
    if need <= vram * GIB:
        yield f"Fits {vram:g} GiB: {gib(need).strip()} with context and gaps, in {worst}."
        return
    yield f"Does not fit {vram:g} GiB: {gib(need).strip()} with context and gaps, in {worst}."
    if not rungs:
        yield "No setting that is known here makes it smaller; take fewer frames or a lower resolution."
        return
    yield "What would make it fit, cheapest first, each on top of the ones before:"
    for rung in rungs:
        total = gib(needed(rung.forecast))
        yield f"  {total}  {rung.remedy} ({rung.remedy.about})"
    last = needed(rungs[-1].forecast)
    if last > vram * GIB:
        yield "Still too large: take fewer frames or a lower resolution beside them."


def parts(phase: Phase) -> str:
    """Return what a phase consists of, largest first."""
    ordered = sorted(phase.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} {size / GIB:.2f}" for what, size in ordered if size)


def gib(size: float) -> str:
    """Return bytes in GiB, in a column."""
    return f"{size / GIB:7.2f} GiB"


def figures(value: float) -> str:
    """Return a number with three digits that count, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def readable(seconds: float) -> str:
    """Return seconds, or minutes and hours where they are many."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def as_json(found: Forecast, *, rate: float, rungs: Sequence[Rung] = ()) -> dict[str, Any]:
    """Return everything as JSON-able values; bytes, operations, operations a second."""
    return {
        "clip": dict(zip(("frames", "height", "width"), found.clip, strict=True)),
        "tokens": found.tokens,
        "trained_parameters": found.trained,
        "phases": [
            {"name": p.name, "bytes": p.num_bytes, "parts": dict(p.parts)} for p in found.phases
        ],
        "needed_bytes": round(needed(found)),
        "operations_per_step": found.operations,
        "operations_per_second": rate,
        "cache_bytes": dict(found.cache),
        "unknown": list(found.unknown),
        "remedies": [
            {"keys": dict(rung.remedy.keys), "needed_bytes": round(needed(rung.forecast))}
            for rung in rungs
        ],
    }
