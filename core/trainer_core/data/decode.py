"""Decodes exactly the planned frames, each resized once and cropped once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.data.frames import targets
from trainer_core.data.probe import (
    Broken,
    Inaccessible,
    reason,
    refusal,
    shown_size,
)
from trainer_core.data.rotation import rotation
from trainer_core.data.types import CropPlan, FramePlan, MediaKind, Probe

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SEEK_AFTER = 48
"""Frames before the first wanted one from which on a seek is worth it."""


class TooShort(Exception):
    """A file has fewer frames, or another shape, than its header says.

    probe: what decoding found, None if nothing.
    """

    def __init__(self, probe: Probe | None) -> None:
        super().__init__("other frames than the header says")
        self.probe = probe


def decode(path: Path, frames: FramePlan, crop: CropPlan, *, probe: Probe) -> Tensor:
    """Return the clip (F, 3, H, W) uint8, RGB.

    Frames are found by time stamp, rotation and pixel aspect are applied. One source frame is held
    at a time. Raises TooShort when the file ends early and Unreadable when nothing can be decoded.
    """
    if probe.kind == "image":
        return _image(path, crop)
    import av
    import torch

    clip = torch.empty(frames.count, 3, crop.height, crop.width, dtype=torch.uint8)
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec, aspect = stream.codec_context, stream.sample_aspect_ratio
            real = shown_size(codec.width, codec.height, aspect, rotation(path))
            if real != (probe.width, probe.height):
                # some files tell their pixel aspect only in the coded stream
                raise TooShort(replace(probe, width=real[0], height=real[1]))
            stamps = _stamps(container, stream)
        with av.open(str(path)) as container:
            for picture in _wanted(container, stamps, frames, probe):
                clip[done] = fit(picture, crop)
                done += 1
    except av.FFmpegError as error:
        if not done:
            raise refusal(error, "cannot be decoded") from None
    if done < frames.count:
        raise TooShort(measure(path, probe))
    return clip


def first_frame(path: Path, kind: MediaKind) -> None:
    """Decode the first frame. Raises Broken when there is none, Inaccessible on a failing disk."""
    import av

    if kind == "image":
        _pixels_of(path)
        return
    try:
        with av.open(str(path)) as container:
            if next(container.decode(video=0), None) is None:
                raise Broken("no frame can be decoded")
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise refusal(error, "cannot be decoded") from None
        raise Broken("no frame can be decoded") from None


def fit(picture: Tensor, crop: CropPlan) -> Tensor:
    """Return a picture (H, W, 3) uint8 resized and cropped to (3, crop.height, crop.width)."""
    import torch.nn.functional as F

    image = picture.permute(2, 0, 1)[None]
    if image.shape[-2:] != (crop.resize_h, crop.resize_w):
        image = F.interpolate(
            image, size=(crop.resize_h, crop.resize_w), mode="bicubic", antialias=True
        )
    return image[
        0, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width
    ]  # fmt: skip


def _image(path: Path, crop: CropPlan) -> Tensor:
    import torch

    return fit(torch.from_numpy(_pixels_of(path)), crop)[None].contiguous()


def _pixels_of(path: Path) -> np.ndarray[Any, Any]:
    """Return an image as (H, W, 3) uint8 RGB, turned as it is shown."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                # transparent pixels have arbitrary colours; on white they look as in a viewer
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        broken = getattr(error, "errno", None) is None  # Pillow raises a bare OSError
        kind = Broken if broken else Inaccessible
        raise kind(f"cannot be decoded: {reason(error)}") from None


def _stamps(container: Any, stream: Any) -> list[int]:
    """Return the time stamps of all frames, ascending, without decoding; empty if none."""
    stamps = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                return []
            stamps.append(packet.pts)
    return sorted(stamps)


def _pictures(container: Any, stream: Any) -> Iterator[Any]:
    """Yield decoded frames until the file ends or is damaged."""
    import av

    try:
        for picture in container.decode(stream):
            if picture.is_corrupt:
                return
            yield picture
    except av.FFmpegError:
        # what comes after damage cannot be trusted, so the file ends here
        return


def _wanted(container: Any, stamps: list[int], frames: FramePlan, probe: Probe) -> Iterator[Tensor]:
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    shaper = av.video.reformatter.VideoReformatter()
    if not stamps:
        yield from _by_number(container, stream, frames, probe, shaper)
        return
    half = 1 / probe.rate / 2
    wanted = targets(stamps, frames, time_base=stream.time_base, slack=half)
    if not wanted:
        return
    if stamps.index(wanted[0]) > SEEK_AFTER:
        container.seek(wanted[0], stream=stream, backward=True)
    position = 0
    for picture in _pictures(container, stream):
        if picture.pts is None or picture.pts < wanted[position]:
            continue
        pixels = _pixels(picture, shaper)
        while position < len(wanted) and picture.pts >= wanted[position]:
            yield pixels
            position += 1
        if position == len(wanted):
            return


def _by_number(
    container: Any, stream: Any, frames: FramePlan, probe: Probe, shaper: Any
) -> Iterator[Tensor]:
    """Yield the frames of a file without time stamps, taking its rate as constant."""
    step = probe.rate / frames.rate if frames.rate else Fraction(1)
    numbers = [
        int((frames.start + k) * step + Fraction(1, 2)) for k in range(frames.count)
    ]  # fmt: skip
    position = 0
    for number, picture in enumerate(_pictures(container, stream)):
        if position < len(numbers) and number == numbers[position]:
            yield _pixels(picture, shaper)
            position += 1
        if position == len(numbers):
            return


def _pixels(picture: Any, shaper: Any) -> Tensor:
    """Return a frame as (H, W, 3) uint8 RGB, turned as it is shown."""
    import numpy as np
    import torch

    array = shaper.reformat(picture, format="rgb24").to_ndarray()
    turns = round(picture.rotation / 90) % 4
    return torch.from_numpy(np.ascontiguousarray(np.rot90(array, turns)))


def measure(path: Path, probe: Probe) -> Probe | None:
    """Return the probe with the frames that really decode, None if none does. Decodes all."""
    import av

    count, first, last = 0, 0, 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for picture in _pictures(container, stream):
                if not count:
                    first = picture.pts or 0
                last = picture.pts if picture.pts is not None else last
                count += 1
            span = (last - first) * stream.time_base if count else Fraction(0)
    except av.FFmpegError:
        return None
    if not count:
        return None
    rate = Fraction(count - 1) / span if span > 0 else probe.rate
    return Probe("video", count, rate, probe.width, probe.height)
