"""TREAD token routing, as a plugin of trainer."""

from __future__ import annotations

from trainer_tread.hooks import Tread

__all__ = ["Tread"]
