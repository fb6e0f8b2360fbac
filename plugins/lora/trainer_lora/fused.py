"""The forward of a layer with a LoRA, without the passes over the tokens that peft's takes.

peft writes the adapter's output, its scaled copy and the sum, and casts the tokens to the adapter's dtype
and back; :mod:`trainer_core.linear` adds inside the product. DoRA, dropout, several adapters and
merged weights stay peft's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from trainer_core.linear import Affine, compute, untouched


def take_over(layer: nn.Module, adapter: str) -> None:
    """Give a layer of peft's :func:`forward` and :func:`affine`; layers of other kinds keep theirs."""
    if type(layer).forward is Linear.forward and "forward" not in vars(layer):
        layer.adapter = adapter  # type: ignore[assignment] # a name, no module
        layer.affine = MethodType(affine, layer)  # type: ignore[assignment] # for trainer_core.linear
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign] # on purpose


def affine(layer: Any) -> Affine | None:
    """Return what a layer of peft computes, None where it is more than a product of low rank."""
    name = layer.adapter
    if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [name]:
        return None
    dropout = layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    down, up = layer.lora_A[name], layer.lora_B[name]
    if drops or name in layer.lora_variant or up.bias is not None:
        return None
    if not (untouched(down, nn.Linear) and untouched(up, nn.Linear)):
        return None
    if getattr(vars(layer).get("forward"), "__func__", None) is not forward:
        return None  # somebody put another one in its place
    return Affine(layer.base_layer, down.weight, up.weight, float(layer.scaling[name]))


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the layer's output (..., out) for x (..., in)."""
    if not (args or kwargs or torch.compiler.is_compiling()):
        own = affine(layer)
        outs = None if own is None else compute([own], x)
        if outs is not None:
            return outs[0]
    out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return out
