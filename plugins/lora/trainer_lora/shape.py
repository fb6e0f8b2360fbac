"""What an adapter is, apart from its weights: rank, alpha and dropout of each layer.

Knows nothing of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Pattern = Mapping[str, Any]
"""End of layer names → value."""


@dataclass(frozen=True)
class LayerShape:
    """rank: r. alpha: the output is scaled by alpha / r. dropout_ratio: share of inputs zeroed."""

    rank: int
    alpha: float
    dropout_ratio: float


@dataclass(frozen=True)
class Shape:
    """An adapter's form.

    rank, alpha, dropout_ratio: of the layers that no pattern names; without alpha it is the layer's rank.
    targets: ends of the names of the layers that have it. ranks, alphas, dropouts: exceptions. dora:
    with magnitudes.
    """

    rank: int
    alpha: float | None
    dropout_ratio: float
    targets: tuple[str, ...]
    ranks: Pattern = field(default_factory=dict)
    alphas: Pattern = field(default_factory=dict)
    dropouts: Pattern = field(default_factory=dict)
    dora: bool = False

    def of(self, layer: str) -> LayerShape:
        """Return the form of one layer's adapter."""
        rank = int(chosen(self.ranks, layer, self.rank))
        alpha = chosen(self.alphas, layer, rank if self.alpha is None else self.alpha)
        return LayerShape(rank, alpha, chosen(self.dropouts, layer, self.dropout_ratio))

    def peft_config(self, layers: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of peft's ``LoraConfig``, as JSON holds them.

        layers: full names of those that have an adapter. Only what describes the adapter and what every
        version of peft knows; exceptions by full name. Never a dropout: diffusers loads an adapter in
        training mode, so that samples would be drawn with it.
        """
        alpha = self.rank if self.alpha is None else self.alpha
        shapes = {layer: self.of(layer) for layer in sorted(layers)}
        ranks = {name: s.rank for name, s in shapes.items() if s.rank != self.rank}
        alphas = {name: s.alpha for name, s in shapes.items() if s.alpha != alpha}
        return {
            "r": self.rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "use_rslora": False,
            "use_dora": self.dora,
            **({"rank_pattern": ranks} if ranks else {}),
            **({"alpha_pattern": alphas} if alphas else {}),
        }


def chosen(pattern: Pattern, layer: str, default: Any) -> Any:
    """Return the value of the longest name that stands for a layer, or the default."""
    names = [name for name in pattern if stands_for(name, layer)]
    return pattern[max(names, key=len)] if names else default


def stands_for(name: str, layer: str) -> bool:
    """Return whether a layer's full name is ``name``, or ends with a dot and it."""
    return layer == name or layer.endswith("." + name)


@dataclass(frozen=True)
class Matches:
    """Which of a model's layers a list of targets names.

    layers: full names of linear layers. unknown: targets that name nothing. unfit: target → a named
    module that is no linear layer. known: names of all linear layers.
    """

    layers: tuple[str, ...]
    unknown: tuple[str, ...]
    unfit: Mapping[str, str]
    known: tuple[str, ...]


def match(module: nn.Module, targets: Sequence[str]) -> Matches:
    """Return the layers whose full name is a target or ends with a dot and a target."""
    from torch import nn

    linear = {name: isinstance(child, nn.Linear) for name, child in module.named_modules() if name}
    layers: set[str] = set()
    unfit: dict[str, str] = {}
    unknown = []
    for target in targets:
        named = [name for name in linear if stands_for(target, name)]
        layers.update(named)
        unfit.update((target, name) for name in named if not linear[name])
        if not named:
            unknown.append(target)
    known = tuple(name for name, fits in linear.items() if fits)
    return Matches(tuple(sorted(layers)), tuple(unknown), unfit, known)


def endings(names: Sequence[str]) -> list[str]:
    """Return targets that fit the names, those of repeated blocks first, each once.

    ``blocks.3.attn1.to_q`` gives ``attn1.to_q``, ``blocks.3.attn1.to_out.0`` ``attn1.to_out.0``; a
    name outside of a numbered list stays whole.
    """
    inside, outside = {}, {}
    for name in names:
        end = inside_blocks(name)
        if end:
            inside[end] = True
        else:
            outside[name] = True
    return [*inside, *outside]


def inside_blocks(name: str) -> str:
    """Return what follows the number of a repeated block, or an empty string outside of blocks."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-2]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else ""
