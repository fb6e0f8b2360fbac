"""The world of the tiny Wan: one shape that moves over a plain background, told in one sentence.

Clips are 64 x 64 pixels and 17 frames at 16 frames per second. 216 captions of the grammar exist;
60 of them are held out from pretraining, so that a score on them shows composition, not memory.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.media import write_mp4
from trainer_core.testing.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

if TYPE_CHECKING:
    import numpy as np

SIZE, FRAMES, FPS = 64, 17, 16.0
NUM_HELD_OUT = 60
NEW_SHAPES = ("star", "bar")
"""Shapes that pretraining never shows: what a LoRA can teach."""
SMOOTH = 4
"""Pictures are drawn this much larger and averaged down, so that motion is smooth below a pixel."""
CRF = 8
"""Quality of the H.264 files, see :func:`trainer_core.media.write_mp4`."""


@dataclass(frozen=True)
class Scene:
    """What a clip shows. radius, path: pixels, the path from first to last frame; aside: pixels from the
    middle, across the motion; ahead: pixels from the middle, along it.
    """

    colour: str
    shape: str
    motion: str
    background: str
    radius: float = 11.0
    path: float = 26.0
    aside: float = 0.0
    ahead: float = 0.0

    @property
    def caption(self) -> str:
        """Such as "a red circle moves left on a black background"."""
        head = f"a {self.colour} {self.shape} moves {self.motion}"
        return f"{head} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Return one scene for each of the 216 captions, in a fixed order."""
    return [
        Scene(*words)
        for words in itertools.product(sorted(COLOURS), SHAPES, MOTIONS, sorted(BACKGROUNDS))
    ]


def split() -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and the 60 held-out ones; every word is in both."""
    scenes = all_scenes()
    random.Random("held out").shuffle(scenes)
    return scenes[NUM_HELD_OUT:], scenes[:NUM_HELD_OUT]


def blobs(n: int) -> list[Scene]:
    """Return scenes of irregular outlines: a VAE has to know edges, not the shapes of the grammar."""
    draw = random.Random("blobs")
    return [
        Scene(
            draw.choice(sorted(COLOURS)), f"blob {number}", draw.choice(sorted(MOTIONS)),
            draw.choice(sorted(BACKGROUNDS)),
        )
        for number in range(n)
    ]  # fmt: skip


def varied(scene: Scene, seed: int) -> Scene:
    """Return the scene with size, path and place drawn; the shape stays inside the picture."""
    draw = random.Random(f"{scene.caption} {seed}")
    radius, path = draw.uniform(8.5, 12.5), draw.uniform(20, 32)
    beside = SIZE / 2 - radius - 2
    along = max(beside - path / 2, 0)
    return Scene(
        scene.colour, scene.shape, scene.motion, scene.background, radius, path,
        draw.uniform(-beside, beside), draw.uniform(-along, along),
    )  # fmt: skip


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around (x, y), all of about the same area."""
    if shape == "square":
        half = radius * 0.86
        return [
            (x - half, y - half),
            (x + half, y - half),
            (x + half, y + half),
            (x - half, y + half),
        ]
    if shape == "triangle":
        reach = radius * 1.25
        return [
            (x, y - reach), (x + reach * 0.95, y + reach * 0.65), (x - reach * 0.95, y + reach * 0.65),
        ]  # fmt: skip
    if shape == "bar":  # upright and narrow
        wide, tall = radius * 0.45, radius * 1.5
        return [
            (x - wide, y - tall),
            (x + wide, y - tall),
            (x + wide, y + tall),
            (x - wide, y + tall),
        ]
    if shape == "star":
        turns = [math.pi * (k / 5 - 0.5) for k in range(10)]
        reach = [radius * (1.35 if k % 2 == 0 else 0.55) for k in range(10)]
        return _around(x, y, turns, reach)
    if shape.startswith("blob"):
        draw = random.Random(shape)
        turns = sorted(draw.uniform(0, 2 * math.pi) for _ in range(draw.randint(4, 12)))
        return _around(x, y, turns, [radius * draw.uniform(0.5, 1.35) for _ in turns])
    turns = [2 * math.pi * k / 64 for k in range(64)]
    return _around(x, y, turns, [radius] * len(turns))


def _around(
    x: float, y: float, turns: list[float], reach: list[float]
) -> list[tuple[float, float]]:
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(turns, reach, strict=True)]


def draw_frames(scene: Scene) -> np.ndarray[Any, Any]:
    """Return the frames (17, 64, 64, 3) uint8."""
    import numpy as np
    from PIL import Image, ImageDraw

    dx, dy = MOTIONS[scene.motion]
    frames = []
    for number in range(FRAMES):
        way = (number / (FRAMES - 1) - 0.5) * scene.path + scene.ahead
        x = SIZE / 2 + dx * way + abs(dy) * scene.aside
        y = SIZE / 2 + dy * way + abs(dx) * scene.aside
        image = Image.new("RGB", (SIZE * SMOOTH,) * 2, BACKGROUNDS[scene.background])
        corners = outline(scene.shape, x, y, scene.radius)
        scaled = [(SMOOTH * a, SMOOTH * b) for a, b in corners]
        ImageDraw.Draw(image).polygon(scaled, fill=COLOURS[scene.colour])
        frames.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return np.stack(frames)


def write_scenes(folder: Path, scenes: Sequence[Scene], *, done: Any = None) -> list[Path]:
    """Write each scene as an mp4 with its caption beside it; files that are there stay.

    done: called with 1 after each clip.
    """
    paths = []
    for number, scene in enumerate(scenes):
        path = folder / f"clip_{number:04d}.mp4"
        text = path.with_suffix(".txt")
        if not (path.exists() and text.exists()):
            write_mp4(draw_frames(scene), path, fps=FPS, crf=CRF)
            text.write_text(scene.caption + "\n", encoding="utf-8")
        paths.append(path)
        if done is not None:
            done(1)
    return paths


def many(scenes: Iterable[Scene], each: int, *, seed: int = 0) -> list[Scene]:
    """Return ``each`` variations of every scene, so that any first part of the list is mixed."""
    listed = list(scenes)
    return [varied(scene, seed + number) for number in range(each) for scene in listed]
