"""LyCORIS adapters, as a plugin of trainer."""

from __future__ import annotations

from trainer_lycoris.hooks import Lycoris

__all__ = ["Lycoris"]
