"""CREPA, the alignment of hidden states with a teacher's features over frames, as a plugin of trainer."""

from __future__ import annotations

from trainer_crepa.hooks import Crepa

__all__ = ["Crepa"]
