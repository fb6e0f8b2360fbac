from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_lycoris import Lycoris

CONFIG = {"algo": "lokr", "multiplier": 1, "linear_dim": 2, "linear_alpha": 1, "factor": 4}


class TestLycoris(PluginContract):
    name = "lycoris"
    plugin = Lycoris
    settings = {"lycoris_config": {**CONFIG, "dropout": 0.1}}  # noqa: RUF012  # a ClassVar of the contract
    core = {"model_type": "lora", "lora_type": "lycoris"}  # noqa: RUF012  # a ClassVar of the contract
    core_without = {"model_type": "full", "lora_type": "standard"}  # noqa: RUF012  # a ClassVar of the contract
