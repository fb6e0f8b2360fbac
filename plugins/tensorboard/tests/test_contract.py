from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_tensorboard import Tensorboard


class TestTensorboard(PluginContract):
    name = "tensorboard"
    plugin = Tensorboard
    core = {"report_to": "tensorboard"}  # noqa: RUF012  # a ClassVar of the contract
    core_without = {"report_to": "none"}  # noqa: RUF012  # a ClassVar of the contract
