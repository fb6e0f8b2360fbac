"""The adapter's file as lycoris-lora has it: ``lycoris_<layer>.lokr_w1`` and so on, dots as underscores.

float32; the metadata key ``lycoris_config`` holds the content of the config as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.adapters import BIAS, TOLERANCE, write_proven
from trainer_core.changes import by_layer, largest_error, weight_change
from trainer_core.errors import CheckpointError
from trainer_core.files import write_tensors
from trainer_lycoris.adapter import Adapted, adapted, alpha, exact_change, frozen, parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

METADATA = "lycoris_config"
PREFIX = "lycoris_"


def stored(layer: Adapted) -> dict[str, Tensor]:
    """Return a layer's tensors by part, as files hold them."""
    import torch

    parts = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in parameters(layer).items()
    }
    scale = alpha(layer)
    return parts if scale is None else {**parts, "alpha": torch.tensor(scale)}


def write(path: Path, module: nn.Module, config: Any, facts: Mapping[str, str]) -> None:
    """Write the adapter of ``module``, read it back, compare, then rename it.

    A CheckpointError says what differs; ``path`` is then as it was.
    """
    tensors = {
        f"{PREFIX}{name.replace('.', '_')}.{part}": value
        for name, layer in adapted(module)
        for part, value in stored(layer).items()
    }
    metadata = {"format": "pt", **facts, METADATA: json.dumps(config, sort_keys=True)}
    write_proven(
        path,
        lambda beside: write_tensors(beside, tensors, metadata=metadata),
        lambda beside: verify(beside, module),
    )


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Return layer, in the library's spelling, → tensors by part, and the config; CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return by_layer(tensors, prefix=PREFIX), config


def differences(
    found: Mapping[str, Mapping[str, Tensor]], config: Any, module: nn.Module, mine: Any
) -> list[str]:
    """Return what keeps a file's content from fitting the adapter of ``module``."""
    wrong = []
    if config != mine:
        wrong.append(f"its lycoris_config is {json.dumps(config)}, this run's {json.dumps(mine)}")
    live = {name.replace(".", "_"): stored(layer) for name, layer in adapted(module)}
    if odd := sorted(live.keys() ^ found.keys()):
        wrong.append(f"{odd[0]} and {len(odd) - 1} more layers stand on one side only")
    for name in sorted(live.keys() & found.keys()):
        shapes = [{p: tuple(v.shape) for p, v in side[name].items()} for side in (found, live)]
        if shapes[0] != shapes[1]:
            wrong.append(f"{name} has {shapes[0]} in the file and {shapes[1]} in this run")
            break
    return wrong


def restore(found: Mapping[str, Mapping[str, Tensor]], module: nn.Module) -> None:
    """Copy a file's tensors into the adapter, bit for bit where the adapter is float32 or less."""
    import torch

    with torch.no_grad():
        for name, layer in adapted(module):
            for part, parameter in parameters(layer).items():
                parameter.copy_(found[name.replace(".", "_")][part])


def verify(path: Path, module: nn.Module) -> None:
    """Raise a CheckpointError unless the file alone gives every layer's weight change as it is live."""
    import torch

    found, _ = read(path)
    names = {name.replace(".", "_"): name for name, _ in adapted(module)}
    if odd := sorted(names.keys() ^ found.keys()):
        raise CheckpointError(f"read back, it and the model differ in {odd[0]}")
    for name, layer in adapted(module):
        theirs = found[name.replace(".", "_")]
        for part, value in stored(layer).items():
            if part not in theirs or not torch.equal(theirs[part], value):
                finite = bool(value.isfinite().all())
                what = "differs" if finite else "holds values that are not finite"
                raise CheckpointError(f"read back, {name}.{part} {what}")
    error, where = largest_error(_pairs(found, module))
    if not error <= TOLERANCE:
        raise CheckpointError(f"read back, the weight change of {where} is off by {error:.3g}")


def _pairs(
    found: Mapping[str, Mapping[str, Tensor]], module: nn.Module
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, layer in adapted(module):
        weight = frozen(layer)
        parts = {p: v.to(weight.device) for p, v in found[name.replace(".", "_")].items()}
        yield name, exact_change(layer), weight_change(parts, weight)
        if "diff_b" in parts:
            yield (
                name + BIAS,
                parameters(layer)["diff_b"].detach().float(),
                parts["diff_b"],
            )
