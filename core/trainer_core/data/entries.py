"""The keys of the data backend file, entry by entry. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from trainer_core.settings.core import CropAspect, CropStyle, ResolutionType

BucketStrategy = Literal["aspect_ratio", "resolution_frames"]
FrameSelection = Literal["head", "random", "uniform", "chunk"]
CaptionStrategy = Literal[
    "textfile", "filename", "instanceprompt", "jsonl", "csv", "parquet"
]  # fmt: skip


def _none_is_zero(value: Any) -> Any:
    return 0 if value is None else value


def _american(value: Any) -> Any:
    return "center" if value == "centre" else value


def _folder_name(value: str) -> str:
    odd = value in (".", "..") or value != value.strip() or not value.isprintable()
    if odd or set("/\\") & set(value) or not 0 < len(value.encode()) <= MOST_ID_BYTES:
        raise ValueError(
            f"names a folder of the cache: write 1 to {MOST_ID_BYTES} bytes of letters, digits, "
            "spaces, dots, - and _, without / or \\"
        )
    return value


MOST_ID_BYTES = 128
Id = Annotated[str, AfterValidator(_folder_name)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VideoKeys(_Entry):
    """Length and position of clips; all counts are at the frame rate of training."""

    num_frames: int | None = Field(default=None, ge=1)
    min_frames: int | None = Field(default=None, ge=1)
    max_frames: int | None = Field(default=None, ge=1)
    bucket_strategy: BucketStrategy = "aspect_ratio"
    frame_interval: int | None = Field(default=None, ge=1)
    frame_selection: FrameSelection = "head"
    framerate: Annotated[float, Field(gt=0)] | Literal["source"] | None = None


class MediaEntry(_Entry):
    """A folder of media that is trained on, or held out (``dataset_type: eval``)."""

    id: Id
    type: Literal["local"] = "local"
    dataset_type: Literal["video", "image", "eval"]
    instance_data_dir: str
    disabled: bool = False
    metadata_backend: Literal["discovery"] = "discovery"
    caption_strategy: CaptionStrategy = "textfile"
    instance_prompt: str | None = None
    caption_file: str | None = None
    caption_column: str = "caption"
    filename_column: str = "file_name"
    cache_dir_vae: str | None = None
    conditioning_image_embeds: str | None = None
    cache_dir_conditioning_image_embeds: str | None = None
    vae_batch_size: int | None = Field(default=None, ge=1)
    repeats: Annotated[int, BeforeValidator(_none_is_zero), Field(ge=0)] = 0
    probability: float | None = Field(default=None, gt=0)
    resolution: float | None = Field(default=None, gt=0)
    resolution_type: ResolutionType | None = None
    aspect_bucket_rounding: int | None = Field(default=None, ge=1, le=9)
    minimum_image_size: float | None = Field(default=None, ge=0)
    maximum_image_size: float | None = Field(default=None, gt=0)
    target_downsample_size: float | None = Field(default=None, gt=0)
    crop: bool = False
    crop_aspect: CropAspect | None = None
    crop_aspect_buckets: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    crop_style: Annotated[CropStyle | None, BeforeValidator(_american)] = None
    video: VideoKeys | None = None


class TextEntry(_Entry):
    """Where encoded captions are kept."""

    id: Id
    type: Literal["local"] = "local"
    dataset_type: Literal["text_embeds"]
    default: bool = False
    disabled: bool = False
    cache_dir: str | None = None
    write_batch_size: int | None = Field(default=None, ge=1)


class ImageEmbedsEntry(_Entry):
    """Where image embeddings are kept that condition a model; several datasets may share it."""

    id: Id
    type: Literal["local"] = "local"
    dataset_type: Literal["conditioning_image_embeds"]
    disabled: bool = False
    cache_dir: str | None = None


NOT_BUILT = {
    "image_embeds": "image conditioning of other models",
    "conditioning": "conditioning data",
    "audio": "audio",
}
"""Known dataset types and keys that are not built yet, with what they belong to."""

PENDING_KEYS = {
    "is_i2v": "is no choice of a dataset: the model of the run says whether frames are given.",
}
"""Known keys that are refused, with the reason."""


def section(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the keys below ``video`` of an entry, as they stand there."""
    video = raw.get("video")
    return video if isinstance(video, dict) else {}


def is_true(value: Any) -> bool:
    """Return whether a value of the file means true."""
    return value is True or (isinstance(value, str) and value.lower() in ("true", "1", "yes", "on"))
