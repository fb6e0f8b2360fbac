"""The plugin's keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from trainer_core.settings.keys import PluginSettings, key
from trainer_crepa.schedule import Course

ENCODER = "dinov2_vitg14"
SOURCE = "the teacher's features come from DINOv2 over the clip's own frames"


class CrepaSettings(PluginSettings):
    """What is aligned with what, how strongly, and for how long."""

    crepa_enabled: bool = key(
        False, "Align hidden states with a frozen image encoder's features of near frames (CREPA)."
    )
    crepa_block_index: int = key(
        8, "Block whose output is aligned, counted from 0; negative from the end."
    )
    crepa_weight: float = key(
        0.5, "Weight of the alignment in the loss; 0: off.", ge=0, aliases=("crepa_lambda",)
    )
    crepa_learning_rate: float | None = key(
        None, "Learning rate of the projector; learning_rate without it.", gt=0
    )
    crepa_adjacent_distance: int = key(
        1, "Distance of the neighbouring latent frames; 0: each frame alone.", unit="frames", ge=0
    )
    crepa_temporal_decay: float = key(
        1.0,
        "tau of the neighbours' weight exp(-distance / tau).",
        unit="frames",
        gt=0,
        aliases=("crepa_adjacent_tau",),
    )
    crepa_cumulative_neighbors: bool = key(
        False, "Align with all neighbours up to the distance, not only with those at it."
    )
    crepa_normalize_neighbour_sum: bool = key(
        False, "Divide each frame's sum by the weights in it, so that it lies in [-1, 1]."
    )
    crepa_normalize_by_frames: bool = key(True, "Average over frames; false adds them up.")
    crepa_spatial_align: bool = key(
        True, "Compare token by token; false compares the means of each frame."
    )
    crepa_encoder: str = key(
        ENCODER,
        "Teacher: dinov2_vits14, _vitb14, _vitl14, _vitg14, a Hub repository or a local folder.",
        aliases=("crepa_model",),
    )
    crepa_encoder_image_size: int = key(
        518,
        "The teacher sees frames of about this many pixels squared, in the clip's own aspect ratio.",
        unit="pixels",
        ge=64,
    )
    crepa_encoder_frames_batch_size: int = key(
        -1, "Frames that the teacher takes at once; -1: all of a clip.", unit="frames", ge=-1
    )
    crepa_drop_vae_encoder: bool = key(
        False, "Load the VAE without its encoder once everything is cached."
    )
    crepa_scheduler: Course = key("constant", "Course of the weight after the warm-up.")
    crepa_warmup_steps: int = key(
        0, "The weight rises from 0 over these steps.", unit="steps", ge=0
    )
    crepa_decay_steps: int = key(
        0,
        "Step at which a decay ends, counted from the start of training; 0: max_train_steps.",
        unit="steps",
        ge=0,
    )
    crepa_lambda_end: float = key(0.0, "Weight at the end of a decay.", ge=0)
    crepa_power: float = key(1.0, "Power of the polynomial decay.", gt=0)
    crepa_cutoff_step: int = key(0, "CREPA ends at this step; 0: never.", unit="steps", ge=0)
    crepa_similarity_threshold: float | None = key(
        None, "CREPA ends when the averaged similarity gets here.", ge=-1, le=1
    )
    crepa_similarity_ema_decay: float = key(
        0.99, "Share of the averaged similarity that an update keeps.", ge=0, lt=1
    )
    crepa_threshold_mode: Literal["permanent", "recoverable"] = key(
        "permanent",
        "permanent: it stays off and costs nothing; recoverable: it comes back below the threshold.",
    )
    crepa_feature_source: str = key("encoder", "Only encoder: " + SOURCE + ".")
    crepa_use_backbone_features: bool = key(False, "Only false: " + SOURCE + ".")
    crepa_self_flow: bool = key(False, "Only false: " + SOURCE + ".")
    crepa_use_tae: bool = key(False, "Only false: " + SOURCE + ", no decoder is needed.")

    @field_validator(
        "crepa_feature_source", "crepa_use_backbone_features", "crepa_self_flow", "crepa_use_tae"
    )
    @classmethod
    def _other_sources(cls, value: Any) -> Any:
        if value not in (False, "encoder"):
            raise ValueError(f"is not built: {SOURCE}; remove the key")
        return value

    @field_validator("crepa_encoder_frames_batch_size")
    @classmethod
    def _some_frames(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be -1 (all frames of a clip) or at least 1")
        return value

    @model_validator(mode="after")
    def _ends_after_warm_up(self) -> CrepaSettings:
        """Refuse a decay that ends before it begins."""
        if 0 < self.crepa_decay_steps <= self.crepa_warmup_steps:
            raise ValueError(
                f"crepa_decay_steps ({self.crepa_decay_steps}) counts from the start of training and "
                f"must lie behind crepa_warmup_steps ({self.crepa_warmup_steps})"
            )
        return self

    @property
    def acts(self) -> bool:
        """Whether anything is aligned at all."""
        ends_higher = self.crepa_scheduler != "constant" and self.crepa_lambda_end > 0
        return self.crepa_enabled and (self.crepa_weight > 0 or ends_higher)
