"""Loads a transformer from a folder or a single file, after checking that it fits its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_core.errors import ModelError
from trainer_wan.export import tensor_files
from trainer_wan.weights import TransformerFiles, opened

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")
ORIGINAL = ("self_attn.", "cross_attn.", "time_embedding.", "head.head")
TIME = ("condition_embedder.time_embedder.", "condition_embedder.time_proj.")
FLAG = "wan_force_2_1_time_embedding"


def names_in(place: Path) -> dict[str, tuple[Path, str]]:
    """Return diffusers' name of each tensor → (file, the name that it has there).

    place: a folder in diffusers layout, or a single file with diffusers' or the original names, under
    any of the prefixes that other trainers write.
    """
    if place.is_dir():
        stored = tensor_files(place)
    else:
        with opened(place) as file:
            stored = dict.fromkeys(file.keys(), place)
    return {new: (stored[old], old) for old, new in _renamed(stored).items()}


def _renamed(stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name → diffusers' name."""
    bare = {name: _bare(name) for name in stored}
    if not any(part in name for name in bare.values() for part in ORIGINAL):
        return bare
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    back = {new: old for old, new in bare.items()}
    # it renames keys and leaves values alone: the values carry the old names through
    renamed = convert_wan_transformer_to_diffusers({new: _Name(new) for new in back})
    return {back[value.text]: name for name, value in renamed.items()}


class _Name:
    def __init__(self, text: str) -> None:
        self.text = text


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def read_tensors(place: Path, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the wanted tensors that are there, by diffusers' names, on the CPU."""
    found = {}
    names = names_in(place)
    for name in wanted:
        if name in names:
            path, stored = names[name]
            with opened(path) as file:
                found[name] = file.get_tensor(stored)
    return found


def shapes_in(place: Path) -> dict[str, tuple[int, ...]]:
    """Return diffusers' name of each tensor → its shape; no tensor is read."""
    shapes = {}
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, stored) in names_in(place).items():
        by_file.setdefault(path, []).append((name, stored))
    for path, pairs in by_file.items():
        with opened(path) as file:
            shapes |= {name: tuple(file.get_slice(stored).get_shape()) for name, stored in pairs}
    return shapes


def wanted_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor of the transformer that a config.json describes."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(dict(config))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def unfit(files: TransformerFiles) -> list[str]:
    """Return the names of tensors whose shape is not what the config says, sorted.

    Raises ModelError where tensors are missing or unknown.
    """
    shapes, wanted = shapes_in(files.place), wanted_shapes(files.config)
    for names, kind in (
        (wanted.keys() - shapes, "missing"),
        (shapes.keys() - wanted, "unexpected"),
    ):
        if names:
            raise ModelError(
                f"the weights of {files.source} do not fit their config.json: {kind} keys {min(names)} "
                f"and {len(names) - 1} more. Fetch the model again, or name the weights of the "
                "model_flavour."
            )
    return sorted(name for name in wanted if shapes[name] != wanted[name])


def load_transformer(
    files: TransformerFiles,
    *,
    dtype: torch.dtype,
    base: TransformerFiles | None = None,
    force_2_1_time_embedding: bool = False,
) -> tuple[WanTransformer3DModel, list[str]]:
    """Return the transformer and the names of tensors that were taken from ``base`` instead.

    What diffusers keeps in float32 stays so. force_2_1_time_embedding: a time embedding that does not
    fit is taken from ``base``. Raises ModelError, naming tensor and both shapes, for anything else
    that does not fit.
    """
    odd = unfit(files)
    curable = force_2_1_time_embedding and base is not None
    cured = [name for name in odd if curable and name.startswith(TIME)]
    if rest := [name for name in odd if name not in cured]:
        raise _wrong_shape(files, rest, curable=curable)
    with torch.random.fork_rng(devices=[]):  # building layers draws, loading then overwrites
        if files.place.is_dir() and not cured:
            return _from_folder(files, dtype), []
        state = read_tensors(files.place, names_in(files.place))
        if cured:
            assert base is not None
            family = [name for name in state if name.startswith(TIME)]
            state |= read_tensors(base.place, family)
            cured = family
        return _from_state(files, state, dtype), cured


def _from_folder(files: TransformerFiles, dtype: torch.dtype) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    transformer: WanTransformer3DModel = WanTransformer3DModel.from_pretrained(
        files.place, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return transformer


def _from_state(
    files: TransformerFiles, state: dict[str, Tensor], dtype: torch.dtype
) -> WanTransformer3DModel:
    """Return the transformer of tensors, in the dtypes that ``from_pretrained`` would give them."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights():
        transformer: WanTransformer3DModel = WanTransformer3DModel.from_config(files.config)
    precise = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, value in state.items():
        keep = precise & set(name.split("."))
        state[name] = value.to(torch.float32 if keep else dtype)
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()


def _wrong_shape(files: TransformerFiles, names: list[str], *, curable: bool) -> ModelError:
    first = next((name for name in names if name.startswith(TIME)), names[0])
    shapes, wanted = shapes_in(files.place), wanted_shapes(files.config)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    text = (
        f"the weights of {files.source} do not fit the model: {first} is {shapes[first]}, it must be "
        f"{wanted[first]}{more}."
    )
    if first.startswith(TIME) and not curable:
        return ModelError(
            f"{text} Set {FLAG} to true: the time embedding is then taken from "
            "pretrained_model_name_or_path."
        )
    return ModelError(f"{text} Set model_flavour to what the weights are, or name other weights.")
