"""UMT5 text encoder of the Wan models, as a plugin of trainer."""

from __future__ import annotations

from trainer_umt5.hooks import Umt5

__all__ = ["Umt5"]
