"""What travels through the data side: one slotted record for each file and sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trainer_core.data.entries import BucketStrategy, CaptionStrategy, FrameSelection
from trainer_core.settings.core import CropAspect, CropStyle, ResolutionType

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""``with progress(title, total) as advance: advance(parts)``, such as ``Display.task``."""

MediaKind = Literal["video", "image"]


def no_progress(title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """Show nothing."""
    return nullcontext(lambda *_args, **_kwargs: None)


@dataclass(frozen=True, slots=True)
class Dataset:
    """An entry of the data backend file with the defaults of the settings filled in.

    kinds: the media it takes. held_out: measured, never trained on. cache_dir, embeds_dir: of encoded
    clips and of image embeddings. The other fields are the keys of the file; sizes are in the unit of
    ``resolution_type``.
    """

    id: str
    kinds: frozenset[MediaKind]
    held_out: bool
    folder: Path
    cache_dir: Path
    caption_strategy: CaptionStrategy
    instance_prompt: str | None
    caption_file: Path | None
    caption_column: str
    filename_column: str
    resolution: float
    resolution_type: ResolutionType
    aspect_rounding: int
    minimum_size: float
    maximum_size: float | None
    downsample_size: float | None
    crop: bool
    crop_aspect: CropAspect
    crop_aspects: tuple[float, ...] | None
    crop_style: CropStyle
    num_frames: int | None
    min_frames: int | None
    max_frames: int | None
    bucket_strategy: BucketStrategy
    frame_interval: int | None
    frame_selection: FrameSelection
    framerate: float | Literal["source"] | None
    repeats: int
    probability: float | None
    vae_batch_size: int | None
    embeds_dir: Path


@dataclass(frozen=True, slots=True)
class Probe:
    """What a header says of a file; frame counts are provisional until the file was decoded.

    width, height: as shown, after rotation and pixel aspect. rate: average, frames per second.
    """

    kind: MediaKind
    frames: int
    rate: Fraction
    width: int
    height: int

    @property
    def duration_s(self) -> float:
        """How long the file is shown."""
        return float(self.frames / self.rate) if self.rate else 0.0


@dataclass(frozen=True)
class FramePlan:
    """Which frames make a clip: ``count`` frames from number ``start`` on.

    rate: frames are taken by time, number k at k / rate seconds; None: every frame of the source.
    """

    start: int
    count: int
    rate: Fraction | None = None

    @cached_property
    def key(self) -> str:
        """Text that two plans share exactly when they mean the same frames."""
        return f"{self.start}+{self.count}@{self.rate or 'source'}"


@dataclass(frozen=True)
class CropPlan:
    """One resize of the frame to (resize_w, resize_h), then a crop at (left, top), in pixels."""

    resize_w: int
    resize_h: int
    left: int
    top: int
    width: int
    height: int

    @cached_property
    def key(self) -> str:
        """Text that two plans share exactly when they mean the same pixels."""
        return f"{self.resize_w}x{self.resize_h}:{self.left},{self.top},{self.width}x{self.height}"


@dataclass(slots=True)
class MediaFile:
    """A file of a dataset. skipped: why it is not used, empty when it is. broken: cannot be read."""

    dataset: int
    name: str
    size: int
    mtime_ns: int
    captions: tuple[str, ...] = ()
    probe: Probe | None = None
    note: str = ""
    skipped: str = ""
    digest: str = ""
    broken: bool = False


@dataclass(slots=True)
class Sample:
    """One clip as it is encoded: a file, its frames and its crop. uses: how often in an epoch."""

    file: int
    variant: int
    frames: FramePlan
    crop: CropPlan
    uses: int = 1


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of one dataset that can share a batch: one size, one length. samples: indices."""

    dataset: int
    width: int
    height: int
    frames: int
    samples: tuple[int, ...]
    uses: int

    @property
    def name(self) -> str:
        """Such as 832x480@73."""
        return f"{self.width}x{self.height}@{self.frames}"


def plain(value: Any) -> str:
    """Return a number without a needless decimal point."""
    return f"{float(value):g}"
