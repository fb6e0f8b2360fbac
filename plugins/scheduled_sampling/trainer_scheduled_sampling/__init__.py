"""Scheduled sampling, also called rollout, as a plugin of trainer."""

from __future__ import annotations

from trainer_scheduled_sampling.hooks import ScheduledSampling

__all__ = ["ScheduledSampling"]
