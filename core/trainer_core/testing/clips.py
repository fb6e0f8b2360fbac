"""Writes small real videos with captions: shapes that move."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.media import write_mp4

if TYPE_CHECKING:
    import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "magenta": (210, 50, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {"black": (8, 8, 8), "gray": (110, 110, 110), "navy": (16, 24, 72)}
SIZES = ((96, 64), (64, 96), (64, 64), (128, 72))
RATES = (16, 24, 30, 12)
MIN_S, MAX_S = 1.2, 4.0


@dataclass(frozen=True)
class Clip:
    """What a clip shows. size: (width, height) in pixels."""

    colour: str
    shape: str
    motion: str
    background: str
    size: tuple[int, int]
    frames: int
    fps: float

    @property
    def caption(self) -> str:
        """Such as "a red circle moves left on a black background"."""
        head = f"a {self.colour} {self.shape} moves {self.motion}"
        return f"{head} on a {self.background} background"


def random_clip(
    seed: int,
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    fps: float | None = None,
) -> Clip:
    """Return a clip that depends on the seed; what is given is not drawn."""
    draw = random.Random(f"clip {seed}")
    colour, shape, motion, background = (
        draw.choice(sorted(words)) for words in (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    )
    # sizes and rates go round, so that a few clips show all of them
    size = size or SIZES[seed % len(SIZES)]
    fps = fps or RATES[(seed // len(SIZES) + seed) % len(RATES)]
    length = frames or round(draw.uniform(MIN_S, MAX_S) * fps)
    return Clip(colour, shape, motion, background, size, length, fps)


def draw_frames(clip: Clip) -> np.ndarray[Any, Any]:
    """Return the frames (F, H, W, 3) uint8 of a clip; the shape crosses the picture once."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = clip.size
    radius = min(width, height) / 5
    dx, dy = MOTIONS[clip.motion]
    frames = []
    for number in range(clip.frames):
        way = (number / max(clip.frames - 1, 1) - 0.5) * 0.6
        x, y = width * (0.5 + dx * way), height * (0.5 + dy * way)
        image = Image.new("RGB", clip.size, BACKGROUNDS[clip.background])
        draw = ImageDraw.Draw(image)
        box = (x - radius, y - radius, x + radius, y + radius)
        if clip.shape == "circle":
            draw.ellipse(box, fill=COLOURS[clip.colour])
        elif clip.shape == "square":
            draw.rectangle(box, fill=COLOURS[clip.colour])
        else:
            corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
            draw.polygon(corners, fill=COLOURS[clip.colour])
        frames.append(np.asarray(image))
    return np.stack(frames)


def write_clip(clip: Clip, path: Path) -> Path:
    """Write a clip as H.264 with its caption in a text file beside it; return the path."""
    write_mp4(draw_frames(clip), path, fps=clip.fps)
    path.with_suffix(".txt").write_text(clip.caption + "\n", encoding="utf-8")
    return path


def write_clips(
    folder: Path,
    *,
    n: int = 8,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] | None = None,
    frames: int | None = None,
    fps: float | None = None,
) -> list[Path]:
    """Write ``n`` clips with captions and return their paths.

    sizes: (width, height) pairs that the clips go round; frames, fps: of every clip. What is not
    given varies: four shapes of picture from 64 to 128 pixels, about 1 to 4 seconds, 12 to 30 fps.
    The same arguments give the same clips.
    """
    paths = []
    for number in range(n):
        size = sizes[number % len(sizes)] if sizes else None
        clip = random_clip(seed * 1000 + number, size=size, frames=frames, fps=fps)
        paths.append(write_clip(clip, folder / f"clip_{number:03d}.mp4"))
    return paths
