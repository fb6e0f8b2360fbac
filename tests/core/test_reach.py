"""A run ends at its first step where gradients do not reach what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer_core import ConfigError, PluginError, PluginInfo, hookimpl
from trainer_core.testing.harness import attempt, train
from trainer_core.testing.tiny import Tiny


class Low(nn.Module):
    """A low-rank adapter around a layer, which it calls by way of ``call``."""

    def __init__(self, layer: nn.Linear, call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        draw = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(2, layer.in_features, generator=draw))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.call(self.layer, x) + x @ self.a.T @ self.b.T
        return out


def plain(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer(x)
    return out


def deaf(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Rounding without a gradient of its own, as quantised inputs do it."""
    return plain(layer, (x * 8).round() / 8)


def adapted(call: Any) -> type[Tiny]:
    """Return a tiny model whose layers below the blocks are adapted."""

    class Adapted(Tiny):
        @hookimpl
        def load_model(self, run: Any) -> Any:
            model = super().load_model(run)
            for block in model.stacks()["transformer"].blocks:
                block.requires_grad_(False)
                for name in ("q", "k", "v", "out"):
                    setattr(block, name, Low(getattr(block, name), call))
            for part in ("patch", "text", "time", "head"):
                getattr(model.modules["transformer"], part).requires_grad_(False)
            return model

    return Adapted


def run(folder: Path, call: Any) -> Any:
    plugins = {"tiny": adapted(call)}
    return attempt(folder, plugins=plugins, settings={"max_train_steps": 2})


def test_gradients_that_arrive_are_not_mentioned(tmp_path: Path):
    done = run(tmp_path, plain)
    assert done.error is None
    assert len(done.steps) == 2


def test_a_first_block_that_none_reaches_ends_the_run_at_its_first_step(tmp_path: Path):
    done = run(tmp_path, deaf)
    assert isinstance(done.error, PluginError), done.error
    assert "no gradient reaches block 0 of transformer" in str(done.error)
    assert not list(done.folder.glob("checkpoint-*"))


class Deaf:
    """Stores weights in a way that lets no gradient through."""

    info = PluginInfo(
        summary="Deaf", provides=("quantiser",), values=("base_model_precision=deaf",)
    )

    def __init__(self, settings: Any) -> None:
        pass


def test_with_quantised_weights_the_key_is_named(tmp_path: Path):
    keys = {"base_model_precision": "deaf", "max_train_steps": 2}
    done = attempt(tmp_path, plugins={"tiny": adapted(deaf), "deaf": Deaf}, settings=keys)
    assert isinstance(done.error, ConfigError), done.error
    text = str(done.error)
    assert "base_model_precision = 'deaf': lets no gradient through to block 0" in text
    assert "Write no_change" in text


class Frozen(Tiny):
    """Trains the head alone, and something that no loss sees."""

    @hookimpl
    def load_model(self, run: Any) -> Any:
        model = super().load_model(run)
        network: Any = model.modules["transformer"]
        network.blocks.requires_grad_(False)
        network.patch.requires_grad_(False)
        network.aside = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        return model


def test_outside_of_blocks_the_first_and_last_weights_count(tmp_path: Path):
    done = attempt(tmp_path, plugins={"tiny": Frozen}, settings={"max_train_steps": 2})
    assert isinstance(done.error, PluginError), done.error
    assert "the last weights of transformer" in str(done.error)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_looking_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int):
    from trainer_core import reach

    keys = {"gradient_accumulation_steps": accumulation}
    looked = train(tmp_path, plugins={}, settings=keys, output="looked")
    monkeypatch.setattr(reach, "_ends", lambda training, role: [])
    blind = train(tmp_path, plugins={}, settings=keys, output="blind")
    assert looked.events == blind.events
    assert looked.weights() == blind.weights()
