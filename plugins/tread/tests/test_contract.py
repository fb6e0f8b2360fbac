from __future__ import annotations

from trainer_core.testing.contract import PluginContract
from trainer_tread import Tread


class TestTread(PluginContract):
    name = "tread"
    plugin = Tread
    settings = {  # noqa: RUF012  # a ClassVar of the contract
        "tread_config": {  # fits any model of two or more blocks
            "routes": [
                {"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 0},
                {"selection_ratio": 0.25, "start_layer_idx": 1, "end_layer_idx": -1},
            ]
        }
    }
