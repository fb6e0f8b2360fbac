"""The Wan family of video diffusion models, as a plugin of trainer."""

from __future__ import annotations

from trainer_wan.hooks import Wan

__all__ = ["Wan"]
