"""The adapter's file: float32, alpha and rank in the metadata, under one of two kinds of names.

diffusers: ``transformer.<layer>.lora_A.weight``; the metadata key ``lora_adapter_metadata`` holds peft's
arguments as JSON, each with the prefix before its name. ``WanPipeline.load_lora_weights`` and other
loaders of diffusers read both. comfyui: ``diffusion_model.<authors' name>.lora_down.weight`` with
``.alpha`` beside it; peft's arguments stand under a key of ours, so that a run can go on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.adapters import COMFYUI, TOLERANCE, write_proven
from trainer_core.changes import by_layer, largest_error, weight_change
from trainer_core.files import write_tensors
from trainer_lora.adapter import ADAPTER, MAGNITUDE, adapted, change, frozen, weights
from trainer_lora.shape import Shape, inside_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

METADATA = "lora_adapter_metadata"
NATIVE_METADATA = "trainer_lora"
"""Beside alpha tensors peft's arguments need another key: diffusers would scale by both."""
PREFIX = "transformer"
"""diffusers expects it before the names of either expert; the loader chooses the expert."""


class FileError(ValueError):
    """A file does not hold the adapter that it should hold."""


@dataclass(frozen=True)
class Content:
    """What a file holds: tensors by name without prefix, float32, and peft's arguments (may be empty).

    comfyui: under the authors' names.
    """

    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any]
    comfyui: bool = False


def write(
    path: Path,
    module: nn.Module,
    shape: Shape,
    facts: Mapping[str, str],
    *,
    prove: Callable[[Path], None],
) -> None:
    """Write the adapter of ``module`` under diffusers' names; it counts when it is proven."""
    tensors = {f"{PREFIX}.{name}": stored(value) for name, value in weights(module).items()}
    metadata = {"format": "pt", **facts, METADATA: packed(module, shape)}
    write_proven(path, lambda beside: write_tensors(beside, tensors, metadata=metadata), prove)


def stored(value: Tensor) -> Tensor:
    """Return a trained tensor as files hold it."""
    import torch

    return value.detach().to("cpu", torch.float32).contiguous()


def packed(module: nn.Module, shape: Shape) -> str:
    """Return peft's arguments as diffusers packs them into metadata."""
    arguments = shape.peft_config([name for name, _ in adapted(module)])
    return json.dumps({f"{PREFIX}.{k}": v for k, v in arguments.items()}, sort_keys=True)


def native_tensors(module: nn.Module, shape: Shape) -> dict[str, dict[str, Tensor]]:
    """Return layer → tensors by part, as ComfyUI takes them.

    Loaders look for alpha inside of blocks only: elsewhere the scale stands in the matrix.
    """
    import torch

    found = {}
    for name, layer in adapted(module):
        form = shape.of(name)
        parts = {
            "lora_down.weight": stored(layer.lora_A[ADAPTER].weight),
            "lora_up.weight": stored(layer.lora_B[ADAPTER].weight),
        }
        if inside_blocks(name):
            parts["alpha"] = torch.tensor(float(form.alpha))
        else:
            parts["lora_up.weight"] = parts["lora_up.weight"] * (form.alpha / form.rank)
        if shape.dora:
            parts["dora_scale"] = stored(layer.lora_magnitude_vector[ADAPTER].weight).view(-1, 1)
        found[name] = parts
    return found


def read(path: Path) -> Content:
    """Return what a file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            metadata = json.loads(told.get(METADATA, told.get(NATIVE_METADATA, "{}")))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    comfyui = any(name.startswith(COMFYUI) for name in tensors)
    prefix = COMFYUI if comfyui else f"{PREFIX}."
    return Content(
        {name.removeprefix(prefix): value for name, value in tensors.items()},
        {name.removeprefix(f"{PREFIX}."): value for name, value in metadata.items()},
        comfyui,
    )


def in_our_names(content: Content, layers: Mapping[str, str]) -> Content:
    """Return a file under the authors' names as one under diffusers', bit for bit.

    layers: layer → its authors' name. Layers that the file has beyond those keep their names.
    """
    ours = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    ours |= {"dora_scale": MAGNITUDE}
    back = {native: layer for layer, native in layers.items()}
    tensors = {}
    for native, parts in by_layer(content.tensors).items():
        for part, value in parts.items():
            if part != "alpha":  # the metadata has it
                flat = value.view(-1) if part == "dora_scale" else value
                tensors[f"{back.get(native, native)}.{ours.get(part, part)}"] = flat
    return Content(tensors, content.arguments)


def differences(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], module: nn.Module, shape: Shape
) -> list[str]:
    """Return what keeps a file's content from fitting an adapter: rank, alpha, layers, shapes."""
    found = []
    live = weights(module)
    wanted = shape.peft_config([name for name, _ in adapted(module)])
    for name in ("r", "lora_alpha", "use_dora", "rank_pattern", "alpha_pattern"):
        theirs, mine = arguments.get(name), wanted.get(name)
        if theirs != mine and (theirs or mine):
            found.append(f"{name} is {theirs} in the file and {mine} in this run")
    for names, where in ((live.keys() - tensors.keys(), "lacks"), (tensors.keys() - live, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            aim = "" if where == "lacks" else ", which this run does not train"
            found.append(f"the file {where} {min(names)}{more}{aim}")
    for name in sorted(live.keys() & tensors):
        theirs, ours = tuple(tensors[name].shape), tuple(live[name].shape)
        if theirs != ours:
            found.append(f"{name} has shape {theirs} in the file and {ours} in this run")
            break  # a wrong rank makes all of them wrong
    return found


def restore(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy a file's tensors into the adapter, bit for bit where the adapter is float32 or less."""
    import torch

    with torch.no_grad():
        for name, parameter in weights(module).items():
            parameter.copy_(tensors[name])


def verify(path: Path, module: nn.Module, shape: Shape) -> float:
    """Return the largest error of a layer's weight change, rebuilt from the file alone.

    From the file: the papers' formula, r being the rows of A. Live: with the scale of peft's forward.
    FileError where a bit, an argument or a layer differs, or a change by more than the tolerance.
    """
    content = read(path)
    if content.arguments != shape.peft_config([name for name, _ in adapted(module)]):
        raise FileError(f"read back, its metadata is {content.arguments}")
    live = weights(module)
    if live.keys() != content.tensors.keys():
        raise FileError(
            f"read back, it and the model differ in {min(live.keys() ^ content.tensors.keys())}"
        )
    for name, value in live.items():
        if not _equal(content.tensors[name].to(value.device), value):
            finite = bool(value.isfinite().all())
            what = "differs" if finite else "holds values that are not finite"
            raise FileError(f"read back, {name} {what}")
    error, layer = largest_error(_pairs(content, module))
    if not error <= TOLERANCE:
        raise FileError(f"read back, the weight change of {layer} is off by {error:.3g}")
    return error


def _equal(stored: Tensor, live: Tensor) -> bool:
    import torch

    return torch.equal(stored, live.detach().float())  # host sync


def _pairs(content: Content, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    import torch

    alpha, alphas = content.arguments["lora_alpha"], content.arguments.get("alpha_pattern", {})
    for name, layer in adapted(module):
        weight = frozen(layer)
        parts = {
            part: content.tensors[f"{name}.{part}"].to(weight.device)
            for part in ("lora_A.weight", "lora_B.weight")
        }
        parts["alpha"] = torch.tensor(float(alphas.get(name, alpha)))
        if f"{name}.{MAGNITUDE}" in content.tensors:
            magnitude = content.tensors[f"{name}.{MAGNITUDE}"].to(weight.device)
            parts["dora_scale"] = magnitude.view(-1, 1)
        yield name, change(layer), weight_change(parts, weight)
