"""Frozen weights in 8 bits through torchao, as a plugin of trainer."""

from __future__ import annotations

from trainer_torchao.hooks import TorchAO

__all__ = ["TorchAO"]
