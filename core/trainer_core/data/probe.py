"""What the header of a file says: frames, rate, size. Nothing is decoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from trainer_core.data.rotation import rotation
from trainer_core.data.types import MediaKind, Probe

TIMES_PER_S = 1_000_000


class Unreadable(Exception):
    """Why a file cannot be used, in a sentence without a capital."""


class Broken(Unreadable):
    """The bytes of the file are no picture or video that can be read."""


class Inaccessible(Unreadable):
    """The file cannot be opened or read now, which may change while the file stays the same."""


def refusal(error: BaseException, what: str = "cannot be read") -> Unreadable:
    """Return the error of a library as one of ours."""
    kind = Inaccessible if isinstance(error, OSError) else Broken
    return kind(f"{what}: {reason(error)}")


def probe(path: Path, kind: MediaKind) -> Probe:
    """Return what the header says. Raises Unreadable."""
    try:
        if not path.stat().st_size:
            raise Broken("the file is empty")
        return _image(path) if kind == "image" else _video(path)
    except OSError as error:
        raise refusal(error) from None


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
        raise Broken("not an image") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise refusal(error) from None
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
        raise refusal(error) from None
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
