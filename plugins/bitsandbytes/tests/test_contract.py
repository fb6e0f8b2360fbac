from __future__ import annotations

import pytest

from trainer_bitsandbytes import BitsAndBytes
from trainer_core.testing.contract import PluginContract

pytest.importorskip("bitsandbytes")


class TestBitsAndBytes(PluginContract):
    name = "bitsandbytes"
    plugin = BitsAndBytes
    core = {  # noqa: RUF012  # a ClassVar of the contract
        "optimizer": "bnb-lion8bit-paged",
        "optimizer_config": "min_8bit_size=64",
    }
    core_without = {"optimizer": "adamw", "optimizer_config": None}  # noqa: RUF012  # a ClassVar
