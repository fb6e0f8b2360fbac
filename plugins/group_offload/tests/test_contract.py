from __future__ import annotations

import pytest

from trainer_core.testing.contract import PluginContract
from trainer_group_offload import GroupOffload

lora = pytest.importorskip("trainer_lora")


class TestGroupOffload(PluginContract):
    """Without CUDA, where it says that it has no effect; test_group_offload_run.py has it act."""

    name = "group_offload"
    plugin = GroupOffload
    settings = {"enable_group_offload": True}  # noqa: RUF012  # a ClassVar of the contract
    others = {"lora": lora.Lora}  # noqa: RUF012  # a ClassVar of the contract
    core = {  # noqa: RUF012  # a ClassVar of the contract
        "model_type": "lora",
        "peft_lora_target_modules": "q,k,v,out",
    }
