"""The adapter's file: diffusers' key names, float32, alpha and rank in the metadata.

``<prefix>.<layer>.lora_A.weight``; the metadata key ``lora_adapter_metadata`` holds peft's
arguments as JSON, each with the prefix before its name. ``WanPipeline.load_lora_weights`` and other
loaders of diffusers read both. Knows nothing of the trainer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_lora.adapter import ADAPTER, Shape, adapted, weights

if TYPE_CHECKING:
    from torch import Tensor, nn

METADATA = "lora_adapter_metadata"
PREFIX = "transformer"
"""diffusers expects it before the names of either expert; the loader chooses the expert."""


class FileError(ValueError):
    """A file does not hold the adapter that it should hold."""


def write(path: Path, module: nn.Module, shape: Shape) -> None:
    """Write the adapter of ``module`` beside ``path``, read it back, compare, then rename it.

    A FileError says what differs; ``path`` is then as it was before.
    """
    import torch

    from trainer_core.files import write_tensors

    tensors = {
        f"{PREFIX}.{name}": value.detach().to("cpu", torch.float32).contiguous()
        for name, value in weights(module).items()
    }
    packed = {f"{PREFIX}.{name}": value for name, value in shape.peft_config().items()}
    metadata = {"format": "pt", METADATA: json.dumps(packed, sort_keys=True)}
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write_tensors(beside, tensors, metadata=metadata)
        verify(beside, module, shape)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by name without prefix, (r, in) and (out, r) float32, and peft's arguments."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {_bare(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return tensors, {_bare(name): value for name, value in metadata.items()}


def _bare(name: str) -> str:
    return name.removeprefix(f"{PREFIX}.")


def differences(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], module: nn.Module, shape: Shape
) -> list[str]:
    """Return what keeps a file's content from fitting an adapter: rank, alpha, layers, shapes."""
    found = []
    for name, mine in (("r", shape.rank), ("lora_alpha", shape.alpha)):
        if arguments.get(name) != mine:
            found.append(f"{name} is {arguments.get(name)} in the file and {mine} in this run")
    live = weights(module)
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


def verify(path: Path, module: nn.Module, shape: Shape) -> None:
    """Raise a FileError unless the file alone gives every layer's weight change as it is live.

    From the file: alpha / r * B @ A in float32, r being the rows of A. Live: what peft's layer
    adds, with the scale of its forward.
    """
    tensors, arguments = read(path)
    if arguments != shape.peft_config():
        raise FileError(f"read back, its metadata is {arguments}")
    live = weights(module)
    if live.keys() != tensors.keys():
        raise FileError(
            f"read back, it and the model differ in {min(live.keys() ^ tensors.keys())}"
        )
    for name, layer in adapted(module):
        _compare(name, layer, tensors, float(arguments["lora_alpha"]))


def _compare(name: str, layer: Any, tensors: Mapping[str, Tensor], alpha: float) -> None:
    import torch

    parts = []
    for part in ("lora_B", "lora_A"):
        live = getattr(layer, part)[ADAPTER].weight.detach()
        stored = tensors[f"{name}.{part}.weight"].to(live.device)
        if not torch.equal(stored, live.float()):  # host sync
            what = "differs" if bool(live.isfinite().all()) else "holds values that are not finite"
            raise FileError(f"read back, {name}.{part} {what}")
        parts.append(stored)
    b, a = parts  # (out, r), (r, in)
    with torch.no_grad():
        change = layer.get_delta_weight(ADAPTER)  # (out, in)
    rebuilt = alpha / a.shape[0] * (b @ a)
    # Products in 16 bits round each entry; in float32 only the order of the sums differs.
    limit = 1e-5 if change.dtype == torch.float32 else 2e-2
    error = float((rebuilt - change.float()).abs().max())  # host sync
    if not error <= limit * float(rebuilt.abs().max()):
        raise FileError(f"read back, the weight change of {name} is off by {error:.3g}")
