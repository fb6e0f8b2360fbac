"""TensorBoard tracker, as a plugin of trainer."""

from __future__ import annotations

from trainer_tensorboard.hooks import Tensorboard

__all__ = ["Tensorboard"]
