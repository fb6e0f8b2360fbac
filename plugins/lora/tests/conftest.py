"""A tiny real Wan transformer behind a stand-in for its plugin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import nn

from trainer_core.hookspecs import hookimpl
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Expert, ModelSpec, Placement
from trainer_lora import Lora
from trainer_lora.config import LoraSettings

CPU = torch.device("cpu")


def transformer(seed: int = 0) -> Any:
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=2,
            in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
        ).eval()  # fmt: skip


class Network(nn.Module):
    """Calls the transformer as it stands."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@dataclass
class StandIn:
    """What the plugin needs of a model."""

    modules: dict[str, Any]
    networks: dict[str, nn.Module]
    spec: ModelSpec


def stand_in(*roles: str) -> StandIn:
    modules = {role: transformer(seed) for seed, role in enumerate(roles or ("transformer",))}
    spec = ModelSpec("tiny", 16, 4, 16, (4, 16, 16), tuple(Expert(role) for role in modules))
    return StandIn(modules, {role: Network(module) for role, module in modules.items()}, spec)


class Loader:
    """The plugin within: what a model plugin does."""

    def __init__(self, model: StandIn) -> None:
        self.model = model

    @hookimpl
    def load_model(self, run: Run) -> StandIn:
        return self.model


def make_run(tmp_path: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Run:
    return Run(CoreSettings(**keys), placement=Placement(CPU, dtype, dtype), output_dir=tmp_path)


def set_up(
    tmp_path: Path, model: StandIn | None = None, run: Run | None = None, **keys: Any
) -> tuple[Lora, Run]:
    from trainer_core import hookspecs

    plugin, run = Lora(LoraSettings(**keys)), run or make_run(tmp_path)
    host = pluggy.PluginManager(hookspecs.PROJECT)
    host.add_hookspecs(hookspecs)
    host.register(Loader(model or stand_in()))
    host.register(plugin)
    host.check_pending()
    run.model = host.hook.load_model(run=run)
    return plugin, run


def example() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, 2, 4, 4, generator=draw),
        "timestep": torch.tensor([250.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=draw),
    }


def predict(module: Any) -> torch.Tensor:
    out: torch.Tensor = module(**example(), return_dict=False)[0]
    return out


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def train(module: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(trained(module).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = predict(module).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def tiny() -> SimpleNamespace:
    helpers = (transformer, stand_in, make_run, set_up, predict, trained, train)
    return SimpleNamespace(**{helper.__name__: helper for helper in helpers})
