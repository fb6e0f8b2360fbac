from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_model_offload import ModelOffload


class TestModelOffload(PluginContract):
    name = "model_offload"
    plugin = ModelOffload
    settings = {"enable_model_cpu_offload": True}  # noqa: RUF012  # a ClassVar of the contract
