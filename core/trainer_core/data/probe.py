"""What the header of a file says: frames, rate, size. Nothing is decoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from trainer_core.data.types import MediaKind, Probe

TIMES_PER_S = 1_000_000
MAX_BOX_DEPTH = 2


class Unreadable(Exception):
    """Why a file cannot be used, in a sentence without a capital."""


def probe(path: Path, kind: MediaKind) -> Probe:
    """Return what the header says. Raises Unreadable."""
    try:
        if not path.stat().st_size:
            raise Unreadable("the file is empty")
        return _image(path) if kind == "image" else _video(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Return what went wrong without the path that libraries repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def _image(path: Path) -> Probe:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"cannot be read: {reason(error)}") from None
    return Probe("image", 1, Fraction(1), width, height)


def _video(path: Path) -> Probe:
    import av

    try:
        # without skip_frame FFmpeg decodes a few frames, which takes ten times as long
        with av.open(str(path), options={"skip_frame": "all"}) as container:
            if not container.streams.video:
                raise Unreadable("it has no picture")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            if not rate:
                raise Unreadable("its header gives no frame rate")
            frames = stream.frames or _by_duration(container, stream, rate)
            width, height = shown_size(
                stream.codec_context.width, stream.codec_context.height,
                stream.sample_aspect_ratio, rotation(path),
            )  # fmt: skip
    except av.FFmpegError as error:
        raise Unreadable(f"cannot be read: {reason(error)}") from None
    if min(frames, width, height) < 1:
        raise Unreadable("its header gives no frames or no size")
    return Probe("video", frames, Fraction(rate), width, height)


def _by_duration(container: Any, stream: Any, rate: Fraction) -> int:
    if stream.duration:
        seconds = stream.duration * stream.time_base
    else:
        seconds = Fraction(container.duration or 0, TIMES_PER_S)
    frames: int = round(seconds * rate)
    return max(frames, 1)


def shown_size(
    width: int, height: int, pixel_aspect: Fraction | None, degrees: int
) -> tuple[int, int]:
    """Return (width, height) as shown: pixels made square, then turned."""
    if pixel_aspect and pixel_aspect != 1 and pixel_aspect > 0:
        width = max(round(width * pixel_aspect), 1)
    return (height, width) if degrees % 180 else (width, height)


def rotation(path: Path) -> int:
    """Return by how many degrees a file of the MP4 family is turned when shown; 0 for others.

    FFmpeg tells it only with a decoded frame, which costs ten times as much as reading the header.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
            if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
                return 0
            file.seek(0, 2)
            return _track_rotation(file, 0, file.tell())
    except OSError:
        return 0


def _track_rotation(file: BinaryIO, start: int, end: int) -> int:
    """Return the turn that a track header between two offsets gives (boxes moov, trak, tkhd)."""
    at = start
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return 0
        size, name, skip = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, skip = int.from_bytes(head[8:16], "big"), 16
        size = size or end - at
        if size < skip:
            return 0
        if name in (b"moov", b"trak") and (
            found := _track_rotation(file, at + skip, min(at + size, end))
        ):
            return found
        if name == b"tkhd":
            file.seek(at + skip)
            return _turn(file.read(size - skip if size < 4096 else 0))
        at += size
    return 0


def _turn(header: bytes) -> int:
    at = 52 if header[:1] == b"\x01" else 40
    matrix = [int.from_bytes(header[at + i : at + i + 4], "big", signed=True) for i in (0, 4)]
    if len(header) < at + 36 or not any(matrix):
        return 0
    a, b = matrix
    if abs(a) >= abs(b):
        return 180 if a < 0 else 0
    return 90 if b > 0 else 270
