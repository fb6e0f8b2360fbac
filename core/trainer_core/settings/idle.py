"""Keys that were set but cannot act beside the values of other keys: said once, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer_core.settings.core import CoreSettings

Condition = Callable[["CoreSettings"], bool]


def _ema(settings: CoreSettings) -> bool:
    return settings.use_ema


def _recomputes(settings: CoreSettings) -> bool:
    return settings.gradient_checkpointing


def _beta(settings: CoreSettings) -> bool:
    return settings.flow_use_beta_schedule


def _normal(settings: CoreSettings) -> bool:
    return not (settings.flow_use_beta_schedule or settings.flow_use_uniform_schedule)


def _falls(settings: CoreSettings) -> bool:
    return settings.lr_scheduler not in ("constant", "constant_with_warmup")


def _renders(settings: CoreSettings) -> bool:
    return settings.validation_step_interval > 0 and bool(settings.validation_prompt)


def _both_lengths(settings: CoreSettings) -> bool:
    return settings.max_train_steps > 0 and settings.num_train_epochs > 0


def _downsamples(settings: CoreSettings) -> bool:
    return settings.maximum_image_size is not None and settings.target_downsample_size is not None


def _quantised(settings: CoreSettings) -> bool:
    return settings.base_model_precision != "no_change"


_PRECISION = "a base_model_precision other than no_change"

ACTS_WITH: Mapping[str, tuple[Condition, str]] = {
    "base_model_default_dtype": (_quantised, _PRECISION),
    "quantize_via": (_quantised, _PRECISION),
    "ema_decay": (_ema, "use_ema"),
    "gradient_checkpointing_interval": (_recomputes, "gradient_checkpointing"),
    "gradient_checkpointing_policy": (_recomputes, "gradient_checkpointing"),
    "ema_update_interval": (_ema, "use_ema"),
    "ema_validation": (_ema, "use_ema"),
    "flow_beta_schedule_alpha": (_beta, "flow_use_beta_schedule"),
    "flow_beta_schedule_beta": (_beta, "flow_use_beta_schedule"),
    "flow_sigmoid_scale": (_normal, "the sigmoid schedule (no uniform or beta schedule)"),
    "lr_end": (_falls, "lr_scheduler linear, cosine or polynomial"),
    "lr_num_cycles": (
        lambda s: s.lr_scheduler == "cosine_with_restarts",
        "lr_scheduler cosine_with_restarts",
    ),
    "lr_power": (lambda s: s.lr_scheduler == "polynomial", "lr_scheduler polynomial"),
    "ignore_final_epochs": (_both_lengths, "max_train_steps and num_train_epochs both above 0"),
    "validation_prompt": (_renders, "validation_step_interval above 0"),
    "validation_step_interval": (_renders, "a validation_prompt"),
    "lora_type": (lambda s: s.model_type == "lora", "model_type lora"),
    "maximum_image_size": (_downsamples, "target_downsample_size"),
    "target_downsample_size": (_downsamples, "maximum_image_size"),
}
"""key → (condition under which it acts, the same in words)."""


def idle_keys(settings: CoreSettings, origins: Mapping[str, str]) -> list[str]:
    """Return a sentence for each key that was set to something and has no effect."""
    fields = type(settings).model_fields
    return [
        f"{key} has no effect: it acts with {words} only"
        for key, (acts, words) in ACTS_WITH.items()
        if key in origins and getattr(settings, key) != fields[key].default and not acts(settings)
    ]
