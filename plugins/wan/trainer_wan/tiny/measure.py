"""Says what a clip shows, by plain image arithmetic: no learned judge, no code of the trainer.

Background: the middle value of the outermost pixels. Shape pixels: those far from it in colour. Colour:
their mean hue, or white where they have none. Direction: the way of their centre from the first frames
to the last. Shape: the outline of equal area around the same centre that covers them best.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer_core.testing.clips import BACKGROUNDS, COLOURS, SHAPES
from trainer_wan.tiny.scenes import NEW_SHAPES, SMOOTH, Scene, outline

if TYPE_CHECKING:
    import numpy as np

    Picture = np.ndarray[Any, Any]

FAR = 0.45
"""A pixel belongs to the shape if its distance from the background is above this share of the largest
one.
"""
LEAST_DISTANCE = 45.0
"""Below this largest distance (of RGB values, 0 to 441) a frame shows nothing."""
LEAST_WAY = 6.0
"""A shape that moves fewer pixels between the first and the last frames stands still."""
GREY_SATURATION = 0.3
ENDS = 4
"""So many frames at each end give the direction."""


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None for what cannot be told."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str


@dataclass(frozen=True)
class Score:
    """Shares of clips, in [0, 1], whose colour, shape and motion are those of their captions."""

    colour: float
    shape: float
    motion: float
    background: float
    num_clips: int

    def __str__(self) -> str:
        names = ("colour", "shape", "motion", "background")
        return ", ".join(f"{name} {getattr(self, name):.0%}" for name in names)


def look(frames: Picture) -> Seen:
    """Return what frames (F, H, W, 3) uint8 show."""
    import numpy as np

    values = frames.astype(np.float64)
    edge = np.concatenate(
        [values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], axis=1
    ).reshape(-1, 3)
    ground = np.median(edge, axis=0)
    distance = np.linalg.norm(values - ground, axis=-1)  # (F, H, W)
    masks = [_mask(one) for one in distance]
    there = [(number, mask) for number, mask in enumerate(masks) if mask is not None]
    background = min(
        BACKGROUNDS, key=lambda name: float(np.linalg.norm(ground - BACKGROUNDS[name]))
    )
    if len(there) < len(masks) / 2:
        return Seen(None, None, None, background)
    inside = np.concatenate([values[number][mask] for number, mask in there])
    colour = name_of(np.median(inside, axis=0))
    return Seen(colour, _shape([mask for _, mask in there]), _motion(there, len(masks)), background)


def _mask(distance: Picture) -> Picture | None:
    largest = float(distance.max())
    if largest < LEAST_DISTANCE:
        return None
    return distance > FAR * largest


def name_of(rgb: Picture) -> str:
    """Return the colour's name: white without a hue, else the nearest hue."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(float(v) / 255 for v in rgb))
    if saturation < GREY_SATURATION:
        return "white"

    def away(name: str) -> float:
        other, _, _ = colorsys.rgb_to_hsv(*(v / 255 for v in COLOURS[name]))
        return min(abs(hue - other), 1 - abs(hue - other))

    return min((name for name in COLOURS if name != "white"), key=away)


def _centre(mask: Picture) -> tuple[float, float]:
    rows, columns = mask.nonzero()
    return float(columns.mean()), float(rows.mean())


def _motion(there: Sequence[tuple[int, Picture]], num_frames: int) -> str | None:
    first = [_centre(mask) for number, mask in there if number < ENDS]
    last = [_centre(mask) for number, mask in there if number >= num_frames - ENDS]
    if not first or not last:
        return None
    dx, dy = (
        sum(p[axis] for p in last) / len(last) - sum(p[axis] for p in first) / len(first)
        for axis in (0, 1)
    )
    if max(abs(dx), abs(dy)) < LEAST_WAY:
        return None
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _shape(masks: Sequence[Picture]) -> str | None:
    chosen = masks[:: max(len(masks) // 6, 1)]
    votes = {name: 0.0 for name in (*SHAPES, *NEW_SHAPES)}
    for mask in chosen:
        for name in votes:
            votes[name] += _overlap(mask, name)
    return max(votes, key=lambda name: votes[name])


def _overlap(mask: Picture, shape: str) -> float:
    """Return the best intersection over union of a mask and a shape of its area near its centre."""
    import numpy as np

    height, width = mask.shape
    centre_x, centre_y = _centre(mask)
    drawn = _drawn(shape, width / 2, height / 2, 10.0, (width, height))
    radius = 10.0 * (float(mask.sum()) / float(drawn.sum())) ** 0.5
    off_x, off_y = (a - b for a, b in zip(_centre(drawn), (width / 2, height / 2), strict=True))
    best = 0.0
    for step_x in (-1.0, 0.0, 1.0):
        for step_y in (-1.0, 0.0, 1.0):
            x = centre_x - off_x * radius / 10 + step_x
            y = centre_y - off_y * radius / 10 + step_y
            other = _drawn(shape, x, y, radius, (width, height))
            both = np.logical_and(mask, other).sum() / max(np.logical_or(mask, other).sum(), 1)
            best = max(best, float(both))
    return best


def _drawn(shape: str, x: float, y: float, radius: float, size: tuple[int, int]) -> Picture:
    """Return the pixels (H, W) bool that an outline around (x, y) covers by half or more."""
    import numpy as np
    from PIL import Image, ImageDraw

    large = Image.new("L", (size[0] * SMOOTH, size[1] * SMOOTH), 0)
    corners = [(SMOOTH * (a + 0.5), SMOOTH * (b + 0.5)) for a, b in outline(shape, x, y, radius)]
    ImageDraw.Draw(large).polygon(corners, fill=255)
    return np.asarray(large.resize(size, Image.Resampling.BOX)) > 127


def score(clips: Sequence[Picture], scenes: Sequence[Scene]) -> Score:
    """Return how many clips show what their scenes say."""
    seen = [look(frames) for frames in clips]

    def share(name: str) -> float:
        right = [getattr(a, name) == getattr(b, name) for a, b in zip(seen, scenes, strict=True)]
        return sum(right) / len(right)

    return Score(share("colour"), share("shape"), share("motion"), share("background"), len(seen))
