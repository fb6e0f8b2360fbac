"""Media as TensorBoard shows them: it knows images, and a GIF is one that moves.

Knows nothing of the trainer.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEOS = frozenset({".mp4", ".webm", ".mkv", ".mov"})


@dataclass(frozen=True)
class Preview:
    """An encoded image (GIF, PNG, JPEG) with its size in pixels."""

    data: bytes
    width: int
    height: int


def preview(path: Path, *, longest_edge: int) -> Preview:
    """Return a video as a GIF that loops, scaled down to ``longest_edge``; an image as it is."""
    if path.suffix.lower() in VIDEOS:
        return _animate(path, longest_edge)
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    return Preview(path.read_bytes(), width, height)


def fit(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """Return the size scaled down until no edge is above ``longest_edge``; never up."""
    scale = min(1.0, longest_edge / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _animate(path: Path, longest_edge: int) -> Preview:
    import av
    from PIL import Image

    frames: list[Any] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 16)
        for frame in container.decode(stream):
            width, height = fit(frame.width, frame.height, longest_edge)
            small = frame.reformat(width=width, height=height, format="rgb24")
            # A palette of its own per frame: one for all would show bands.
            frames.append(Image.fromarray(small.to_ndarray()).quantize(256))
    if not frames:
        raise ValueError(f"{path} holds no frame")
    file = io.BytesIO()
    frames[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations_ms(len(frames), fps),
        loop=0,
    )
    return Preview(file.getvalue(), *frames[0].size)


def durations_ms(num_frames: int, fps: float) -> list[int]:
    """Return how long each frame stands, in ms.

    GIF counts in 10 ms, and browsers slow down what is under 20 ms. The rounding error is carried
    on, so that the whole takes as long as the video.
    """
    ends = [round((i + 1) * 100 / fps) * 10 for i in range(num_frames)]
    return [max(20, end - start) for start, end in zip([0, *ends], ends, strict=False)]
