"""Which frames of a file make a clip. Pure functions; frames are counted at the rate of training.

A clip is taken by time: frame k of a file lies at k / rate seconds, and the source frame nearest to
it is the one that is trained on. A source slower than the model keeps its own frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

from trainer_core.data.types import Dataset, FramePlan, Probe
from trainer_core.types import ModelSpec

CLIP_S = 5.0
"""Length of a clip when no key says it, in seconds."""

SAME_RATE = Fraction(1, 100)
"""Relative difference below which two frame rates count as one (29.97 and 30)."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """The clip lengths of a dataset, in frames at the rate of training.

    fixed: length of every clip, 0 when it follows the file. least, most: bounds of what a file must
    offer; most is 0 without one. cap: largest length that follows a file. note: what was rounded.
    """

    fixed: int
    least: int
    most: int
    cap: int
    interval: int
    note: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a file gives no clip."""

    reason: str


def as_rate(value: float) -> Fraction:
    """Return a frame rate as the fraction that is meant (29.97 → 2997/100)."""
    return Fraction(value).limit_denominator(1001)


def rate_of(dataset: Dataset, spec: ModelSpec) -> Fraction | None:
    """Return the rate that clips are taken at, frames per second; None keeps every frame."""
    if dataset.framerate == "source":
        return None
    return as_rate(dataset.framerate or spec.fps)


def lengths_of(dataset: Dataset, spec: ModelSpec) -> Lengths:
    """Return what ``num_frames``, ``min_frames``, ``max_frames`` and the model allow."""
    default = spec.snap_frames(round(CLIP_S * float(rate_of(dataset, spec) or spec.fps)) + 1)
    wanted = dataset.num_frames
    if dataset.bucket_strategy == "aspect_ratio" and wanted is None:
        wanted = (dataset.min_frames and max(dataset.min_frames, 1)) or default
        if dataset.max_frames:
            wanted = min(wanted, dataset.max_frames)
    fixed = spec.snap_frames(wanted) if wanted else 0
    least = max(fixed, spec.snap_frames(dataset.min_frames or 1), 1)
    note = f"{wanted} -> {fixed} frames" if wanted and wanted != fixed else ""
    return Lengths(
        fixed=fixed,
        least=least,
        most=dataset.max_frames or 0,
        cap=dataset.max_frames or max(default, least),
        interval=dataset.frame_interval or 0,
        note=note,
    )


def effective_rate(source: Fraction, wanted: Fraction | None) -> Fraction | None:
    """Return the rate at which a file gives frames by time; None: all of its own frames.

    A source that is slower than, or as fast as, what is wanted keeps its frames: none is doubled.
    """
    if wanted is None or source <= wanted * (1 + SAME_RATE):
        return None
    return wanted


def frames_at(probe: Probe, rate: Fraction | None) -> int:
    """Return how many frames a file gives at a rate (its own with None).

    Frame k needs a source frame within half of a source frame's duration of k / rate.
    """
    if rate is None:
        return probe.frames
    return max(ceil((probe.frames - Fraction(1, 2)) * rate / probe.rate), 0)


def clip_length(available: int, lengths: Lengths, spec: ModelSpec) -> int | Refusal:
    """Return the length of the clips that a file with so many frames gives, or why none."""
    if available < 1:
        return Refusal("it has no frames")
    if lengths.most and available > lengths.most:
        return Refusal(f"{available} frames, max_frames is {lengths.most}")
    if available < lengths.least:
        return Refusal(f"{available} frames, {lengths.least} are needed")
    if lengths.fixed:
        return lengths.fixed
    frames = min(available, lengths.cap)
    if lengths.interval:
        frames = frames // lengths.interval * lengths.interval or frames
    frames = spec.snap_frames(frames)
    return frames if frames >= lengths.least else Refusal(
        f"{frames} frames after frame_interval {lengths.interval}, {lengths.least} are needed"
    )  # fmt: skip


def starts(
    available: int,
    count: int,
    *,
    selection: Literal["head", "random", "uniform", "chunk"],
    uses: int,
    draw: Callable[[int, int], int],
) -> list[tuple[int, int]]:
    """Return (first frame, uses) of each clip that a file gives in an epoch of ``uses`` passes.

    head: the beginning. random: one draw per pass, ``draw(pass, options)`` in [0, options).
    uniform: the passes spread evenly over the file, one pass takes the middle. chunk: every clip of
    the file, end to end, each in every pass.
    """
    slack = available - count
    if selection == "chunk":
        return [(k * count, uses) for k in range(available // count)]
    if selection == "random" and slack:
        return [(draw(number, slack + 1), 1) for number in range(uses)]
    if selection == "uniform" and slack:
        return [(slack * (2 * number + 1) // (2 * uses), 1) for number in range(uses)]
    return [(0, uses)]


def targets(pts: list[int], plan: FramePlan, *, time_base: Fraction, slack: Fraction) -> list[int]:
    """Return the time stamps of the source frames that make the clip, in order.

    pts: of all frames, ascending. slack: half of a source frame's duration, in seconds. The list is
    shorter than ``plan.count`` when the file ends early.
    """
    if plan.rate is None:
        return pts[plan.start : plan.start + plan.count]
    from bisect import bisect_left

    found: list[int] = []
    origin = pts[0] if pts else 0
    for number in range(plan.start, plan.start + plan.count):
        at = origin + number / plan.rate / time_base
        if not pts or at >= pts[-1] + slack / time_base:
            break
        right = min(bisect_left(pts, at), len(pts) - 1)
        left = max(right - 1, 0)
        found.append(pts[left] if at - pts[left] < pts[right] - at else pts[right])
    return found
