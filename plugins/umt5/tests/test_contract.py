from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.contract import PluginContract
from trainer_umt5 import Umt5


class TestUmt5(PluginContract):
    name = "umt5"
    plugin = Umt5
    core = {"tiny_text_width": 32}  # noqa: RUF012  # a ClassVar of the contract
    core_without = {"tiny_text_width": 0}  # noqa: RUF012  # a ClassVar of the contract

    @classmethod
    def world(cls, folder: Path) -> dict[str, Any]:
        wan = pytest.importorskip("trainer_wan.testing")
        text = wan.write_checkpoint(folder / "model", layers=1)
        return {"pretrained_t5_model_name_or_path": str(text)}
