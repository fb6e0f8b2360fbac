"""Where an adapter starts: from a LoRA that is there already, trained on this model or a relative of it.

Knows nothing of the trainer. The start is exact: before step 1 every layer's weight change is the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer_lora.adapter import ADAPTER, MAGNITUDE, adapted, frozen
from trainer_lora.files import Content
from trainer_lora.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Given:
    """A layer of a file: a (r, in), b (out, r), scale before b @ a, DoRA's magnitude (out,) or None."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


class UnfitError(ValueError):
    """A file that the adapter cannot start from; the way out stands behind the reason."""

    def __init__(self, text: str, way_out: str) -> None:
        super().__init__(text)
        self.way_out = way_out


def given_layers(content: Content) -> dict[str, Given]:
    """Return layer → what a file under diffusers' names has for it; without metadata alpha is r."""
    found = {}
    arguments = content.arguments
    for name in sorted(content.tensors):
        layer, _, part = name.partition(".lora_A.")
        if not part:
            continue
        a, b = content.tensors[name], content.tensors.get(f"{layer}.lora_B.weight")
        if b is None:
            raise UnfitError(f"lacks {layer}.lora_B.weight.", "Name a whole LoRA file.")
        rank = a.shape[0]
        alpha = arguments.get("alpha_pattern", {}).get(layer, arguments.get("lora_alpha", rank))
        scale = float(alpha) / rank
        found[layer] = Given(a, b, scale, content.tensors.get(f"{layer}.{MAGNITUDE}"))
    return found


def native_layers(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Given]:
    """Return layer → what a file under the authors' names has for it; without alpha it is r."""
    found = {}
    for layer, parts in layers.items():
        down = parts.get("lora_down.weight", parts.get("lora_A.weight"))
        up = parts.get("lora_up.weight", parts.get("lora_B.weight"))
        if down is None or up is None:
            text = f"has {min(parts)} for {layer} instead of a LoRA's two matrices."
            raise UnfitError(text, "Name a LoRA file.")
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        lengths = parts.get("dora_scale")
        found[layer] = Given(down, up, scale, None if lengths is None else lengths.view(-1))
    return found


def start_from(given: Mapping[str, Given], module: nn.Module, shape: Shape) -> list[str]:
    """Put a file's layers into the adapter of ``module``; return the layers that the file lacks.

    UnfitError, before anything is changed, for a layer that has no place here.
    """
    import torch

    live = dict(adapted(module))
    _check(given, live, module, shape)
    for name, layer in live.items():
        if (one := given.get(name)) is None:
            continue
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        scale = layer.scaling[ADAPTER]
        with torch.no_grad():
            a.copy_(one.a)
            b.copy_(one.b if one.scale == scale else one.b * (one.scale / scale))
            if shape.dora:
                weight = frozen(layer).double()
                product = one.b.to(weight) @ one.a.to(weight)
                whole = weight + one.scale * product
                row = whole.norm(dim=1) if one.magnitude is None else one.magnitude
                layer.lora_magnitude_vector[ADAPTER].weight.copy_(row)
    return [name for name in live if name not in given]


def _check(
    given: Mapping[str, Given], live: Mapping[str, object], module: nn.Module, shape: Shape
) -> None:
    if not given:
        raise UnfitError("holds no LoRA layer.", "Name a LoRA file.")
    names = {name for name, _ in module.named_modules()}
    for name, one in given.items():
        if name not in live:
            if name in names:
                end = name.rpartition("blocks.")[2].partition(".")[2] or name
                raise UnfitError(
                    f"changes {name}, which has no adapter in this run.",
                    f"Add {end} to peft_lora_target_modules.",
                )
            raise UnfitError(
                f"changes {name}, which the model does not have.", "Name a LoRA of this model."
            )
        if one.magnitude is not None and not shape.dora:
            raise UnfitError("is a DoRA.", "Set use_dora to true.")
        layer: object = live[name]
        rank, wanted = one.a.shape[0], shape.of(name).rank
        if rank != wanted:
            raise UnfitError(
                f"has rank {rank} at {name}, the run {wanted}.",
                f"Set lora_rank to {rank}, or lora_rank_pattern for this layer.",
            )
        ours = (layer.lora_B[ADAPTER].weight.shape[0], layer.lora_A[ADAPTER].weight.shape[1])  # type: ignore[attr-defined]
        theirs = (one.b.shape[0], one.a.shape[1])
        if ours != theirs:
            raise UnfitError(
                f"changes a weight {theirs} at {name}, where the model has {ours}.",
                "Name a LoRA of a model of this size.",
            )
