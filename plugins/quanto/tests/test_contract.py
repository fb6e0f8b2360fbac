from __future__ import annotations

import pytest

from trainer_core.testing.contract import PluginContract
from trainer_quanto import Quanto

pytest.importorskip("optimum.quanto")
lora = pytest.importorskip("trainer_lora")


class TestQuanto(PluginContract):
    name = "quanto"
    plugin = Quanto
    others = {"lora": lora.Lora}  # noqa: RUF012  # a ClassVar of the contract
    core = {  # noqa: RUF012  # a ClassVar of the contract
        "model_type": "lora",
        "base_model_precision": "int8-quanto",
        "peft_lora_target_modules": "q,k,v,out",
    }
    core_without = {"base_model_precision": "no_change"}  # noqa: RUF012  # a ClassVar of the contract
