"""A tiny model of two experts, with names of its authors': what ``trainer export`` needs of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer_core.capabilities import Blocks, NativeNames, SamplingGrid, TokenGrid
from trainer_core.changes import by_layer
from trainer_core.files import read_tensors
from trainer_core.hookspecs import hookimpl
from trainer_core.testing.tiny import Tiny, TinyModel, build_network
from trainer_core.types import Expert, ModelSpec

ROLES = {"transformer": (0.6, 1.0), "transformer_2": (0.0, 0.6)}
OURS = {"q": "query", "k": "key", "v": "value", "out": "output"}
AUTHORS = {"query": "q", "key": "k", "value": "v", "output": "out"}


class TwinsModel(TinyModel):
    """Satisfies NativeNames beside what the tiny model does."""

    def __init__(self, spec: ModelSpec, parts: Mapping[str, Any]) -> None:
        self.spec = spec
        self.modules = {role: network for role, (network, _) in parts.items()}
        self.networks = dict(self.modules)
        self.hidden_size = 32
        self._stacks = {role: stack for role, (_, stack) in parts.items()}

    def stacks(self) -> Mapping[str, Any]:
        return self._stacks

    def native_name(self, layer: str) -> str:
        start, _, last = layer.rpartition(".")
        return f"{start.replace('blocks', 'layers')}.{OURS[last]}"

    def layers_of(self, native: Sequence[str]) -> dict[str, str]:
        found = {}
        for name in native:
            match = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
            assert match is not None
            found[name] = f"blocks.{match[1]}.{AUTHORS[match[2]]}"
        return found

    def read_lora(self, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        tensors = read_tensors(path)
        if any(name.startswith("transformer.") for name in tensors):
            layers = by_layer(tensors, prefix="transformer.")
            return {n: (p["lora_A.weight"], p["lora_B.weight"]) for n, p in layers.items()}
        layers = by_layer(tensors, prefix="diffusion_model.")
        names = self.layers_of(tuple(layers))
        found = {}
        for name, parts in layers.items():
            down, up = parts["lora_down.weight"], parts["lora_up.weight"]
            rank = torch.tensor(float(down.shape[0]))
            found[names[name]] = (down, up * parts.get("alpha", rank) / rank)
        return found


class Twins(Tiny):
    """In the place of plugin ``tiny``: two experts, each on its share of the noise range."""

    info = replace(
        Tiny.info,
        summary="A tiny model of two experts",
        exposes=(Blocks, TokenGrid, SamplingGrid, NativeNames),
    )

    @hookimpl
    def describe_model(self, run: Any) -> ModelSpec:
        spec = super().describe_model(run)
        experts = tuple(Expert(role, low, high) for role, (low, high) in ROLES.items())
        return replace(spec, experts=experts)

    @hookimpl
    def load_model(self, run: Any) -> TwinsModel:
        parts = {
            role: build_network(self.settings.tiny_layers, seed=number)
            for number, role in enumerate(ROLES)
        }
        for network, _ in parts.values():
            network.requires_grad_(run.settings.model_type == "full")
        return TwinsModel(run.spec, parts)
