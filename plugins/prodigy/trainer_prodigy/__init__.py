"""The optimiser Prodigy, as a plugin of trainer."""

from __future__ import annotations

from trainer_prodigy.hooks import Prodigy

__all__ = ["Prodigy"]
