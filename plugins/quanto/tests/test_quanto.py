"""Rounding, learning, refusing: what every quantiser must do."""

from __future__ import annotations

import pytest

from trainer_core.testing.quantisers import QuantiserContract
from trainer_quanto import Quanto

pytest.importorskip("optimum.quanto")


class TestQuanto(QuantiserContract):
    name = "quanto"
    plugin = Quanto
    int8, fp8 = "int8-quanto", "fp8-quanto"

    def adapter(self) -> tuple[str, type]:
        return "lora", pytest.importorskip("trainer_lora").Lora
