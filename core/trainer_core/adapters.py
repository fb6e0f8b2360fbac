"""What adapters' plugins share: files for other programs, what is written into them, their proof."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.capabilities import NativeNames
from trainer_core.changes import bias_change, by_layer, largest_error, weight_change
from trainer_core.errors import CheckpointError, ConfigError, Problem
from trainer_core.files import read_tensors, write_tensors
from trainer_core.types import Exported

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run

COMFYUI = "diffusion_model."
"""What ComfyUI expects before the authors' name of a layer."""

BIAS = " (bias)"
TOLERANCE = 1e-5
"""Largest difference of a layer's weight change, relative to its largest entry."""


@dataclass(frozen=True)
class LiveLayer:
    """A layer with an adapter as it is in the model.

    weight: W (out, in), frozen. change: W' - W (out, in). bias_change: (out,), None where it stays.
    """

    name: str
    weight: Tensor
    change: Tensor
    bias_change: Tensor | None = None


Live = Iterable[LiveLayer]
Pair = tuple[str, "Tensor", "Tensor"]
"""(layer, our change, theirs)."""


def native_names(model: object, *, key: str = "--format") -> NativeNames:
    """Return the model as one that knows its authors' names; ConfigError at ``key`` if it does not."""
    if not isinstance(model, NativeNames):
        text = "the model does not tell the names that its authors' files have."
        raise ConfigError([Problem(key, text, "comfyui", way_out="Write diffusers.")])
    return model


def facts_of(run: Run, role: str, **more: object) -> dict[str, str]:
    """Return what a file's metadata tells of where it comes from; all of it derives from the run alone.

    more: what the adapter adds, such as rank and alpha.
    """
    settings = run.settings
    expert = next(expert for expert in run.model.spec.experts if expert.role == role)
    shift: object = settings.flow_schedule_shift
    if settings.flow_schedule_auto_shift:
        shift = "by resolution"
    told = {
        "base_model": settings.pretrained_model_name_or_path or run.model.spec.name,
        "flavour": run.model.spec.name,
        "expert": role,
        "noise_range": f"{expert.sigma_min:g} to {expert.sigma_max:g}",
        "shift": shift,
        "trained_steps": run.trained_steps,
        "settings_digest": run.settings_digest,
        **more,
    }
    return {name: str(value) for name, value in told.items() if value is not None}


def write_proven(path: Path, write: Callable[[Path], None], prove: Callable[[Path], None]) -> None:
    """Write a file beside ``path``, prove it, and only then give it its name.

    ``prove`` raises where the file is not what it should be; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(beside)
        prove(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_native(
    run: Run,
    path: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    *,
    metadata: Mapping[str, str],
    prove: Callable[[Path], None],
) -> None:
    """Write an adapter under the authors' names, as ComfyUI reads it; it counts when it is proven.

    layers: layer → its tensors by part (:data:`trainer_core.changes.PARTS`).
    """
    model = native_names(run.model)
    named = {
        f"{COMFYUI}{model.native_name(layer)}.{part}": value
        for layer, parts in layers.items()
        for part, value in parts.items()
    }
    write_proven(path, lambda beside: write_tensors(beside, named, metadata=metadata), prove)


def read_native(run: Run, path: Path, live: Live) -> Exported:
    """Compare a file under the authors' names with the model; CheckpointError where they differ.

    Names go back by the converter of the model's library, changes by the papers' formulas.
    """
    layers = by_layer(read_tensors(path), prefix=COMFYUI)
    back = native_names(run.model).layers_of(tuple(layers))
    found = {back[name]: parts for name, parts in layers.items()}
    return compared(path, _by_formula(found, live), found, reader="the papers' formulas")


def _by_formula(found: Mapping[str, Mapping[str, Tensor]], live: Live) -> Iterator[Pair]:
    for layer in live:
        if layer.name not in found:
            raise CheckpointError(f"read back, the file has nothing for {layer.name}")
        parts = {part: value.to(layer.weight.device) for part, value in found[layer.name].items()}
        yield layer.name, layer.change, weight_change(parts, layer.weight)
        theirs = bias_change(parts)
        if (layer.bias_change is None) != (theirs is None):
            raise CheckpointError(f"read back, the bias of {layer.name} is on one side only")
        if layer.bias_change is not None and theirs is not None:
            yield layer.name + BIAS, layer.bias_change, theirs


def read_by_library(run: Run, path: Path, live: Live) -> Exported:
    """Compare a LoRA file with the model, read as the model's library reads it."""
    found = native_names(run.model).read_lora(path)

    def pairs() -> Iterator[Pair]:
        for layer in live:
            if layer.name not in found:
                raise CheckpointError(f"the model's library reads nothing for {layer.name}")
            a, b = (value.to(layer.change) for value in found[layer.name])
            yield layer.name, layer.change, b @ a

    return compared(path, pairs(), found, reader="the model's library")


def compared(path: Path, pairs: Iterable[Pair], found: Collection[str], *, reader: str) -> Exported:
    """Return the result of a comparison; CheckpointError above the tolerance.

    pairs: (layer, ours, theirs). found: the layers that the file has; all of them must be ours.
    """
    counted: set[str] = set()

    def counting() -> Iterator[Pair]:
        for pair in pairs:
            counted.add(pair[0].removesuffix(BIAS))
            yield pair

    error, layer = largest_error(counting())
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"read back by {reader}, the weight change of {layer} is off by {error:.3g} of its size"
        )
    if odd := sorted(set(found) - counted):
        raise CheckpointError(f"read back, the file has {odd[0]}, which the model does not train")
    if not counted:
        raise CheckpointError("there is no layer to write")
    return Exported(path, len(counted), error, reader)


def readers(proofs: Iterable[Exported]) -> str:
    """Return by what a file was read back, in words."""
    return " and by ".join(proof.reader for proof in proofs)
