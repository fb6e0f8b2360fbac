"""The plugin's keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trainer_core.settings.core import Words
from trainer_core.settings.keys import PluginSettings, key

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Query, key, value and output of self- and cross-attention, by diffusers' names."""

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, lt=1)]


class LoraSettings(PluginSettings):
    """Size and place of the adapter."""

    lora_rank: int = key(16, "Rank r of the adapter's matrices.", ge=1)
    lora_alpha: float | None = key(
        None, "The adapter's output is scaled by lora_alpha / lora_rank; the rank without it.", gt=0
    )
    lora_dropout: float = key(
        0.0, "Share of the adapter's inputs that are zeroed in training.", ge=0, lt=1
    )
    peft_lora_target_modules: Words | None = key(
        None,
        "Linear layers that get an adapter: a list, or names with commas between. A name stands "
        "for every layer whose full name ends with it. Without it to_q,to_k,to_v,to_out.0.",
    )
    lora_rank_pattern: dict[str, Rank] | None = key(
        None,
        'Ranks of their own for some layers: an object of names, such as {"attn2.to_k": 4}. A name '
        "stands for every layer whose full name ends with it; of several the longest counts.",
    )
    lora_alpha_pattern: dict[str, Alpha] | None = key(
        None, "Alphas of their own for some layers, written like lora_rank_pattern."
    )
    lora_dropout_pattern: dict[str, Ratio] | None = key(
        None, "Dropouts of their own for some layers, written like lora_rank_pattern."
    )
    use_dora: bool = key(
        False,
        "DoRA: the adapter changes the direction of each row of a weight, and a trained magnitude "
        "its length. Other programs read it from ComfyUI's format only.",
    )
    init_lora: str | None = key(
        None,
        "File of a LoRA to start from: with diffusers' names, those of the model's authors (ComfyUI), or "
        "others that diffusers reads. "
        "Layers that it lacks start without effect. A resumed run does not read it.",
    )
    lora_format: Literal["diffusers", "comfyui"] = key(
        "diffusers",
        "Names in the files of checkpoints and of the end. comfyui: the names of the model's authors, "
        "with alpha; other programs read those too. A resumed run reads either.",
        free=True,
    )

    @field_validator("peft_lora_target_modules")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError(
                "names no layer; write names such as to_q,to_k,to_v,to_out.0 or remove the key"
            )
        return value

    @field_validator("lora_rank_pattern", "lora_alpha_pattern", "lora_dropout_pattern")
    @classmethod
    def _names_layers(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not value:
            raise ValueError("names no layer; write names with their values, or remove the key")
        return value

    @property
    def alpha(self) -> float:
        """Numerator of the scale; a whole number as int, as files of others have it."""
        return whole(float(self.lora_rank if self.lora_alpha is None else self.lora_alpha))

    @property
    def targets(self) -> tuple[str, ...]:
        """Ends of layer names, sorted, each once."""
        return tuple(sorted(set(self.peft_lora_target_modules or DEFAULT_TARGETS)))


def whole(value: float) -> float:
    """Return a number as int where it is one."""
    return int(value) if float(value).is_integer() else value
