"""The model in host memory while samples are decoded, as a plugin of trainer."""

from __future__ import annotations

from trainer_model_offload.hooks import ModelOffload

__all__ = ["ModelOffload"]
