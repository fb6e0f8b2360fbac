"""Writes all weights in diffusers' layout, reads them back, and makes a whole pipeline of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_core.errors import CheckpointError
from trainer_core.files import write_json
from trainer_wan.weights import Weights, opened

if TYPE_CHECKING:
    from torch import nn


def write_transformer(folder: Path, *, role: str, transformer: Any) -> list[str]:
    """Write ``folder/role`` as diffusers does and return the files' names relative to ``folder``.

    The files are read back and compared bit for bit; CheckpointError where they differ.
    """
    target = folder / role
    transformer.save_pretrained(target, safe_serialization=True)
    compare(target, transformer)
    return sorted(str(path.relative_to(folder)) for path in target.iterdir())


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor name → safetensors file of a component, one file or several."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map: dict[str, str] = json.loads(indices[0].read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def compare(folder: Path, module: nn.Module) -> None:
    """Raise CheckpointError unless the files hold exactly the module's tensors, bit for bit."""
    for name, live, stored in _pairs(folder, module):
        if stored.dtype != live.dtype or not _same_bits(stored, live.detach().cpu()):
            raise CheckpointError(
                f"{folder}: {name} was read back differently from what was written. Check the disk."
            )


@torch.no_grad()
def read_transformer(folder: Path, module: nn.Module) -> None:
    """Copy the tensors of ``folder`` into the module, bit for bit.

    CheckpointError where names, shapes or dtypes differ, before anything is changed.
    """
    state = module.state_dict()
    for name, live, stored in _pairs(folder, module):
        if stored.shape != live.shape or stored.dtype != live.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(stored.shape)} {stored.dtype}, the model's is "
                f"{tuple(live.shape)} {live.dtype}. The checkpoint belongs to another run; take "
                "another output_dir, or resume_from_checkpoint none."
            )
    for name, _, stored in _pairs(folder, module):
        state[name].copy_(stored)


def _pairs(folder: Path, module: nn.Module) -> Any:
    """Yield (name, live tensor, stored tensor), one stored tensor in memory at a time."""
    from safetensors import safe_open

    files, state = tensor_files(folder), module.state_dict()
    if odd := sorted(set(files) ^ set(state)):
        raise CheckpointError(
            f"{folder} does not hold the model's tensors: {odd[0]} and {len(odd) - 1} more stand "
            "on one side only. Take another output_dir, or resume_from_checkpoint none."
        )
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 # a safetensors handle is no mapping
                yield name, state[name], file.get_tensor(name)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*flat)


def write_pipeline(folder: Path, *, weights: Weights, trained: dict[str, Any]) -> list[str]:
    """Write a folder that ``WanPipeline.from_pretrained`` loads; return the files' names.

    trained: role → transformer. The other components are copied from ``weights``, so that the
    folder stands alone; a transformer that was not trained is copied too.
    """
    index = weights.index()
    base = weights.whole()
    for role, transformer in trained.items():
        write_transformer(folder, role=role, transformer=transformer)
    for name, value in index.items():
        if name in trained or not isinstance(value, list) or value[0] is None:
            continue
        taken = name.startswith("transformer") or name == "vae"  # may come from elsewhere
        source = weights.component(name) if taken else base / name
        ignore = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt")
        shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=ignore)
    write_json(folder / "model_index.json", index)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
