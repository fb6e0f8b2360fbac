from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.contract import PluginContract
from trainer_wan import Wan
from trainer_wan.testing import write_checkpoint

umt5 = pytest.importorskip("trainer_umt5")


class TestWan(PluginContract):
    name = "wan"
    plugin = Wan
    core = {"model_flavour": "t2v-480p-1.3b-2.1"}  # noqa: RUF012  # a ClassVar of the contract
    others = {"umt5": umt5.Umt5}  # noqa: RUF012  # a ClassVar of the contract

    @classmethod
    def world(cls, folder: Path) -> dict[str, Any]:
        model = write_checkpoint(folder / "model", layers=2)
        return {"pretrained_model_name_or_path": str(model)}
