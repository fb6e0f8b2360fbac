from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_lora import Lora


class TestLora(PluginContract):
    name = "lora"
    plugin = Lora
    settings = {"lora_rank": 2, "lora_dropout": 0.1, "peft_lora_target_modules": "q,k,v,out"}  # noqa: RUF012  # a ClassVar of the contract
    core = {"model_type": "lora"}  # noqa: RUF012  # a ClassVar of the contract
    core_without = {"model_type": "full"}  # noqa: RUF012  # a ClassVar of the contract
