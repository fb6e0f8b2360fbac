"""CLIP image encoder of the Wan 2.1 image-to-video models, as a plugin of trainer."""

from __future__ import annotations

from trainer_clip.hooks import Clip

__all__ = ["Clip"]
