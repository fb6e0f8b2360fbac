"""Writes media as cameras, phones and broken downloads leave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from trainer_core.testing.clips import draw_frames, random_clip

MS = Fraction(1, 1000)


def frames(count: int, *, size: tuple[int, int] = (64, 64)) -> np.ndarray[Any, Any]:
    """Return moving pictures (F, H, W, 3) uint8."""
    return draw_frames(random_clip(3, size=size, frames=count, fps=16))


def write(
    path: Path,
    count: int = 20,
    *,
    size: tuple[int, int] = (64, 64),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 16,
    stamps_ms: Sequence[int] | None = None,
    rotation: int = 0,
    audio: bool = False,
    form: str | None = None,
    options: Mapping[str, str] | None = None,
    header_first: bool = False,
) -> Path:
    """Write a video.

    stamps_ms: when each frame is shown, for variable rates. form: container, else by the ending.
    """
    flags = {"movflags": "+faststart"} if header_first else {}
    with av.open(str(path), "w", format=form, options=flags) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if stamps_ms is not None:
            stream.codec_context.time_base = stream.time_base = MS
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number, picture in enumerate(frames(count, size=size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps_ms is not None:
                frame.pts, frame.time_base = stamps_ms[number], MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_sound(container, sound)
    return path


def write_sound_only(path: Path) -> Path:
    """Write a file of a video's ending that holds sound alone."""
    with av.open(str(path), "w", format="mp4") as container:
        _write_sound(container, container.add_stream("aac", rate=16000))
    return path


def _write_sound(container: Any, stream: Any) -> None:
    for number in range(16):
        wave = np.zeros((1, 1024), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, number * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def cut_after(path: Path, count: int, *, total: int) -> Path:
    """Write ``total`` frames, then cut the file so that ``count`` of them can be decoded."""
    # no B-frames: frames lie in the file in the order in which they are shown
    write(path, total, header_first=True, options={"x264-params": "bframes=0"})
    with av.open(str(path)) as container:
        places = sorted(p.pos for p in container.demux(video=0) if p.pos is not None and p.size)
    with path.open("r+b") as file:
        file.truncate(places[count])
    return path


def spoil_pictures(path: Path) -> Path:
    """Write a file with a whole header whose pictures are zeros."""
    write(path, header_first=True)
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat") + 4
    data[first:] = bytes(len(data) - first)
    path.write_bytes(data)
    return path
