from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_scheduled_sampling import ScheduledSampling


class TestScheduledSampling(PluginContract):
    name = "scheduled_sampling"
    plugin = ScheduledSampling
    settings = {  # noqa: RUF012  # a ClassVar of the contract
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
    }
