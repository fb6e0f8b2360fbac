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


NOT_BUILT = {
    "conditioning_image_embeds": "image conditioning",
    "image_embeds": "image conditioning",
    "conditioning": "conditioning data",
    "audio": "audio",
}
"""Known dataset types and keys that are not built yet, with what they belong to."""

PENDING_KEYS = {
    "conditioning_image_embeds": "image conditioning",
    "cache_dir_conditioning_image_embeds": "image conditioning",
    "is_i2v": "image conditioning",
}
