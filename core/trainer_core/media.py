"""Video files and contact sheets for validation, and frames back from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.data.frames import as_rate
from trainer_core.types import Artifact

if TYPE_CHECKING:
    import numpy as np

    Frames = np.ndarray[Any, Any]

SHEET_FRAMES = 6
SHEET_FRAME_WIDTH = 240
SHEET_MARGIN = 8
CAPTION_LINE = 14


def write_mp4(frames: Frames, path: Path, *, fps: float, crf: int = 18, rotation: int = 0) -> None:
    """Write frames (F, H, W, 3) uint8 RGB as H.264 that plays in a browser.

    Odd sizes get one more row or column, a copy of the last. crf: quality, lower is better.
    rotation: degrees in the file's metadata, counter-clockwise. The file is whole or absent.
    """
    import av
    import numpy as np

    tall, wide = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, tall), (0, wide), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(
            str(temporary), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container:
            # one thread: the bytes of a file do not depend on the machine's cores; no macroblock tree:
            # on small pictures x264's reads memory that it never wrote, and the bytes differ by chance
            options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=as_rate(fps), options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_frames(path: Path) -> Frames:
    """Return all frames of a video (F, H, W, 3) uint8 RGB, turned as shown."""
    import av
    import numpy as np

    with av.open(str(path)) as container:
        return np.stack(
            [
                np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90) % 4)
                for picture in container.decode(video=0)
            ]
        )


def contact_sheet(artifacts: Sequence[Artifact], path: Path) -> None:
    """Write a PNG: for each video a row of evenly spaced frames, with its caption below."""
    from PIL import Image, ImageDraw

    strips = [_strip(artifact) for artifact in artifacts]
    width = max((strip.width for strip in strips), default=1) + 2 * SHEET_MARGIN
    step = CAPTION_LINE + 2 * SHEET_MARGIN
    sheet = Image.new("RGB", (width, sum(s.height + step for s in strips) or 1), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for artifact, strip in zip(artifacts, strips, strict=True):
        sheet.paste(strip, (SHEET_MARGIN, top + SHEET_MARGIN))
        top += strip.height + step
        text = _shortened(artifact.caption or artifact.name, draw, strip.width)
        draw.text((SHEET_MARGIN, top - CAPTION_LINE - SHEET_MARGIN // 2), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def _strip(artifact: Artifact) -> Any:
    from PIL import Image

    count = len(artifact.frames)
    shown = min(count, SHEET_FRAMES)
    picks = [round(k * (count - 1) / max(shown - 1, 1)) for k in range(shown)]
    height, width = artifact.frames.shape[1:3]
    size = (SHEET_FRAME_WIDTH, max(round(height * SHEET_FRAME_WIDTH / width), 1))
    strip = Image.new("RGB", (shown * (size[0] + 2), size[1]), "white")
    for place, pick in enumerate(picks):
        strip.paste(Image.fromarray(artifact.frames[pick]).resize(size), (place * (size[0] + 2), 0))
    return strip


def _shortened(text: str, draw: Any, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 1 and draw.textlength(text) > width:
        text = text[: max(len(text) * 9 // 10 - 1, 1)].rstrip("…") + "…"
    return text
