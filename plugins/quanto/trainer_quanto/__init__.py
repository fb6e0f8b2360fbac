"""Frozen weights in 8 bits through optimum-quanto, as a plugin of trainer."""

from __future__ import annotations

from trainer_quanto.hooks import Quanto

__all__ = ["Quanto"]
