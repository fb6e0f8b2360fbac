"""The optimisers of bitsandbytes, as a plugin of trainer."""

from __future__ import annotations

from trainer_bitsandbytes.hooks import BitsAndBytes

__all__ = ["BitsAndBytes"]
