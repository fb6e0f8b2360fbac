"""The data side: files and captions in, batches of encoded samples out. It knows no model."""

from __future__ import annotations

from trainer_core.data.backends import Backends, load_backends
from trainer_core.data.fill import CachedData, fill_cache
from trainer_core.data.loader import Loader
from trainer_core.data.plan import DataPlan, plan_data
from trainer_core.data.report import render_report

__all__ = [
    "Backends", "CachedData", "DataPlan", "Loader", "fill_cache", "load_backends", "plan_data",
    "render_report",
]  # fmt: skip
