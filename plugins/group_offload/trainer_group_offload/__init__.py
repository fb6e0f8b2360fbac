"""Frozen blocks in host memory, moved ahead of their use, as a plugin of trainer."""

from __future__ import annotations

from trainer_group_offload.hooks import GroupOffload

__all__ = ["GroupOffload"]
