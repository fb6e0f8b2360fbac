from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer_core.testing.contract import PluginContract
from trainer_crepa import Crepa
from trainer_crepa.testing import write_teacher


class TestCrepa(PluginContract):
    name = "crepa"
    plugin = Crepa
    settings = {  # noqa: RUF012  # a ClassVar of the contract
        "crepa_block_index": 1,
        "crepa_encoder_image_size": 64,
    }

    @classmethod
    def world(cls, folder: Path) -> dict[str, Any]:
        """A teacher to look at the clips."""
        return {"crepa_encoder": str(write_teacher(folder / "teacher"))}
