"""What an adapter's file does to a layer's weight, rebuilt from the file alone by the papers' formulas.

One layer's tensors go in by the names that files have; out comes W' - W. Nothing here is shared with the
libraries that train, so that a file can be judged by something else than what wrote it.

LoRA https://arxiv.org/abs/2106.09685, DoRA https://arxiv.org/abs/2402.09353, LoHa
https://arxiv.org/abs/2108.06098, LoKr https://arxiv.org/abs/2309.14859 (with alpha / r before each
product, as all files have it; a LoKr of two whole matrices has no r and no scale).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trainer_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PARTS = (
    "lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "diff", "diff_b", "alpha", "dora_scale",
)  # fmt: skip
"""Ends of the names of an adapter's tensors in files of ComfyUI and of LyCORIS."""

Layer = Mapping[str, "Tensor"]
"""A layer's tensors by part."""


def by_layer(tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """Return layer → its tensors by part. prefix: stands before each name and is dropped.

    CheckpointError for a name that is no part of a known kind.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part = next((p for p in PARTS if name.endswith("." + p)), None)
        if part is None or not name.startswith(prefix):
            raise CheckpointError(f"{name} is no tensor of an adapter that can be rebuilt")
        layer = name[len(prefix) : -len(part) - 1]
        found.setdefault(layer, {})[part] = value
    return found


def weight_change(layer: Layer, weight: Tensor) -> Tensor:
    """Return W' - W (out, in) of a layer, as :func:`widened` has it.

    layer: its tensors by part, as in the file, where W lies. weight: W, for DoRA, which scales the sum of
    W and change.
    """
    scaled = "dora_scale" in layer
    parts = {name: widened(value, scaled=scaled) for name, value in layer.items()}
    change = _product(parts).reshape(weight.shape)
    if "dora_scale" not in parts:
        return change
    frozen = widened(weight, scaled=True)
    whole = frozen + change
    magnitude = parts["dora_scale"]  # (out, 1): a norm for each row; (1, in): for each column
    if magnitude.shape not in ((whole.shape[0], 1), (1, whole.shape[1])):
        raise CheckpointError(f"dora_scale has shape {tuple(magnitude.shape)}")
    along = 1 if magnitude.shape == (whole.shape[0], 1) else 0
    norm = whole.norm(dim=along, keepdim=True)
    changed: Tensor = magnitude / norm * whole - frozen
    return changed


def widened(value: Tensor, *, scaled: bool) -> Tensor:
    """Return a tensor in the precision that changes are compared in.

    float32; scaled: float64, since the change of a DoRA is a small difference of large numbers. float64
    comes on the CPU where the device has none.
    """
    import torch

    if not scaled:
        return value.detach().float()
    on = "cpu" if value.device.type == "mps" else value.device
    return value.detach().to(on, torch.float64)


def plain(weight: Tensor) -> Tensor:
    """Return a frozen weight as its products use it: one that is stored in fewer bits, unpacked."""
    import torch
    from torch import nn

    weight = weight.detach()
    if type(weight) in (torch.Tensor, nn.Parameter):
        return weight
    unpacked: Tensor = weight.dequantize()
    return unpacked


def bias_change(layer: Layer) -> Tensor | None:
    """Return b' - b (out,) of a layer; None where the adapter leaves the bias alone."""
    return widened(layer["diff_b"], scaled=False) if "diff_b" in layer else None


def _product(parts: Layer) -> Tensor:
    import torch

    names = set(parts)
    if "diff" in names:
        return parts["diff"]
    if {"lora_down.weight", "lora_up.weight"} <= names:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]  # (r, in), (out, r)
        return _scale(parts, down.shape[0]) * (up @ down)
    if {"lora_A.weight", "lora_B.weight"} <= names:
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        return _scale(parts, down.shape[0]) * (up @ down)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= names:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]  # (out, r) (r, in)
        second = parts["hada_w2_a"] @ parts["hada_w2_b"]
        return _scale(parts, parts["hada_w1_b"].shape[0]) * (first * second)
    one, first_rank = _factor(parts, "lokr_w1")
    two, second_rank = _factor(parts, "lokr_w2")
    rank = second_rank or first_rank
    scale = _scale(parts, rank) if rank else 1.0
    return scale * torch.kron(one, two)


def _factor(parts: Layer, name: str) -> tuple[Tensor, int]:
    """Return a factor of the Kronecker product and its rank, 0 where it is one whole matrix."""
    if name in parts:
        return parts[name], 0
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        raise CheckpointError(f"the tensors {', '.join(sorted(parts))} are no whole adapter")
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return a @ b, b.shape[0]


def _scale(parts: Layer, rank: int) -> float:
    """Return alpha / r; 1 where the file has no alpha, as readers take it."""
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def largest_error(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[float, str]:
    """Return the largest difference of (layer, ours, theirs) relative to ours, and its layer.

    Infinity where anything is not finite, or where ours is nothing and theirs is something.
    """
    worst, where = 0.0, ""
    for name, ours, theirs in pairs:
        size = float(ours.detach().abs().max())
        off = float((theirs.to(ours) - ours).detach().abs().max())
        if off == 0:
            continue
        error = off / size if size > 0 else float("inf")
        error = error if error == error else float("inf")
        if error >= worst:
            worst, where = error, name
    return worst, where
