"""Rounding, learning, refusing: what every quantiser must do, and what torchao could do and must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core import ConfigError, hookimpl
from trainer_core.testing.harness import attempt
from trainer_core.testing.quantisers import KEYS, QuantiserContract
from trainer_torchao import TorchAO

pytest.importorskip("torchao")


class Dynamic(TorchAO):
    """Rounds inputs as well as weights, which torchao offers too."""

    @hookimpl(wrapper=True)
    def load_model(self, run: Any):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = yield
        for block in model.stacks()["transformer"].blocks:
            quantize_(block, Int8DynamicActivationInt8WeightConfig())
        return model


class TestTorchAO(QuantiserContract):
    name = "torchao"
    plugin = TorchAO
    int8, fp8 = "int8-torchao", "fp8-torchao"

    def adapter(self) -> tuple[str, type]:
        return "lora", pytest.importorskip("trainer_lora").Lora


def test_rounded_inputs_let_no_gradient_through_and_end_the_run(tmp_path: Path):
    lora = pytest.importorskip("trainer_lora")
    keys = {**KEYS, "base_model_precision": TestTorchAO.int8}
    done = attempt(tmp_path, plugins={"torchao": Dynamic, "lora": lora.Lora}, settings=keys)
    assert isinstance(done.error, ConfigError), done.error
    assert "lets no gradient through to block 0 of transformer" in str(done.error)
