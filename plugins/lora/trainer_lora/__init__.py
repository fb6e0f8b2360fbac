"""LoRA adapters, as a plugin of trainer."""

from __future__ import annotations

from trainer_lora.hooks import Lora

__all__ = ["Lora"]
