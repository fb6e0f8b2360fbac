from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_clip import Clip
from trainer_core.testing.contract import PluginContract

wan = pytest.importorskip("trainer_wan")
umt5 = pytest.importorskip("trainer_umt5")


class TestClip(PluginContract):
    name = "clip"
    plugin = Clip
    core = {"model_flavour": "i2v-14b-2.1"}  # noqa: RUF012  # a ClassVar of the contract
    others = {"wan": wan.Wan, "umt5": umt5.Umt5}  # noqa: RUF012  # a ClassVar of the contract
    core_without = None  # the model takes image embeddings

    @classmethod
    def world(cls, folder: Path) -> dict[str, Any]:
        from trainer_wan.testing import write_checkpoint

        model = write_checkpoint(folder / "model", flavour="i2v-14b-2.1", layers=4)
        return {"pretrained_model_name_or_path": str(model)}
