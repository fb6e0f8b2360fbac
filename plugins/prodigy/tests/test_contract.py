from __future__ import annotations

import pytest

from trainer_core.testing.contract import PluginContract
from trainer_prodigy import Prodigy

pytest.importorskip("prodigyopt")


class TestProdigy(PluginContract):
    name = "prodigy"
    plugin = Prodigy
    core = {"optimizer": "prodigy", "learning_rate": 1.0}  # noqa: RUF012  # a ClassVar of the contract
    core_without = {"optimizer": "adamw"}  # noqa: RUF012  # a ClassVar of the contract
