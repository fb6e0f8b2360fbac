"""The plugin's keys."""

from __future__ import annotations

from pydantic import field_validator

from trainer_core.settings.core import Words
from trainer_core.settings.keys import PluginSettings, key

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Query, key, value and output of self- and cross-attention, by diffusers' names."""


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

    @field_validator("peft_lora_target_modules")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError(
                "names no layer; write names such as to_q,to_k,to_v,to_out.0 or remove the key"
            )
        return value

    @property
    def alpha(self) -> float:
        """Numerator of the scale; a whole number as int, as files of others have it."""
        alpha = float(self.lora_rank if self.lora_alpha is None else self.lora_alpha)
        return int(alpha) if alpha.is_integer() else alpha

    @property
    def targets(self) -> tuple[str, ...]:
        """Ends of layer names, sorted, each once."""
        return tuple(sorted(set(self.peft_lora_target_modules or DEFAULT_TARGETS)))
