"""Never two heavy components at once before training begins, told by what is alive."""

from __future__ import annotations

import gc
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import tool
from torch import nn

from trainer_core import hookimpl
from trainer_core.testing.harness import train

wan = pytest.importorskip("trainer_wan")
umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
HEAVY = ("UMT5EncoderModel", "AutoencoderKLWan", "WanTransformer3DModel")
SEEN: list[tuple[str, list[str]]] = []


def alive() -> list[str]:
    """Return the heavy components whose weights are in memory now."""
    gc.collect()
    return sorted(
        type(module).__name__
        for module in gc.get_objects()
        if type(module).__name__ in HEAVY and isinstance(module, nn.Module)
    )


def note(moment: str) -> None:
    SEEN.append((moment, alive()))


class Wan(wan.Wan):
    def _load_vae(self, run: Any) -> Any:
        note("before the VAE")
        network = super()._load_vae(run)
        note("with the VAE")
        return network

    @hookimpl
    def load_model(self, run: Any) -> Any:
        note("before the model")
        model = super().load_model(run)
        note("with the model")
        return model


class Umt5(umt5.Umt5):
    def _load(self, run: Any) -> Any:
        note("before the text encoder")
        network = super()._load(run)
        note("with the text encoder")
        return network


def test_each_heavy_component_is_gone_before_the_next_one_comes(tmp_path: Path):
    SEEN.clear()
    for library in filter(find_spec, ("bitsandbytes", "torchao")):
        import_module(library)  # it logs an error at first, and pytest keeps the frames around it
    before = alive()
    # in a process of its own: nothing that wrote it may count
    tool("trainer_wan.testing", "checkpoint", "wan", "--layers", "1", cwd=tmp_path)
    folder = str(tmp_path / "wan")
    keys = {"model_type": "lora", "lora_rank": 2, "max_train_steps": 1}
    keys |= {"offload_during_startup": True, "pretrained_model_name_or_path": folder}
    keys["pretrained_t5_model_name_or_path"] = folder
    plugins = {"wan": Wan, "umt5": Umt5, "lora": lora.Lora}
    train(tmp_path, plugins=plugins, settings=keys)
    assert before == []
    assert dict(SEEN) == {
        "before the VAE": [],
        "with the VAE": ["AutoencoderKLWan"],
        "before the text encoder": [],
        "with the text encoder": ["UMT5EncoderModel"],
        "before the model": [],
        "with the model": ["WanTransformer3DModel"],
    }
