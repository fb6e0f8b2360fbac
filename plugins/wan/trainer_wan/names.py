"""What Wan's layers are called by its authors, whose names ComfyUI and most LoRA files use.

Writing goes by the table here; reading goes by diffusers' converters alone, so that a file that was
written can be checked by something that does not share the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
PROJECTIONS = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
}
FEED_FORWARD = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def native_name(layer: str) -> str:
    """Return the authors' name of a layer that diffusers calls ``layer``; ModelError if there is none."""
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    if (match := re.fullmatch(r"(blocks\.\d+)\.(.+)", layer)) is not None:
        block, inner = match.groups()
        if inner in FEED_FORWARD:
            return f"{block}.{FEED_FORWARD[inner]}"
        attention, _, projection = inner.partition(".")
        if attention in ATTENTIONS and projection in PROJECTIONS:
            return f"{block}.{ATTENTIONS[attention]}.{PROJECTIONS[projection]}"
    raise ModelError(f"Wan's authors have no name for the layer {layer}; leave it without adapter")


def layers_of(native: Sequence[str]) -> dict[str, str]:
    """Return authors' name → diffusers' name, by diffusers' converter of whole checkpoints."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    found = {}
    for name in native:
        (converted,) = convert_wan_transformer_to_diffusers({f"{name}.weight": name})
        found[name] = converted.removesuffix(".weight")
    return found


def read_lora(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer → (A, B) of a LoRA file, as ``WanPipeline.load_lora_weights`` would take it.

    Scaled by alpha / r, from tensors or from peft's arguments in the metadata, as diffusers does.
    CheckpointError where diffusers cannot read the file.
    """
    from diffusers import WanPipeline

    try:
        tensors, metadata = WanPipeline.lora_state_dict(
            path.parent, weight_name=path.name, return_lora_metadata=True
        )
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"diffusers cannot read the file: {error}") from error
    names = sorted(name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN))
    if not names or len(tensors) != 2 * len(names):
        raise CheckpointError("diffusers reads something else than pairs of LoRA matrices in it")
    arguments = {k.removeprefix(PREFIX): v for k, v in (metadata or {}).items()}
    found = {}
    for name in names:
        layer, a, b = name.removeprefix(PREFIX), tensors[name + DOWN], tensors.get(name + UP)
        if b is None:
            raise CheckpointError(f"diffusers reads only one matrix for {layer}")
        found[layer] = (a.float(), b.float() * _scale(arguments, layer, a.shape[0]))
    return found


def _scale(arguments: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = arguments.get("alpha_pattern", {}).get(layer, arguments.get("lora_alpha", rank))
    return float(alpha) / rank


class AuthorsNames:
    """The capability NativeNames of Wan's models."""

    def native_name(self, layer: str) -> str:
        """Return the authors' name of a layer; ModelError if they have none."""
        return native_name(layer)

    def layers_of(self, native: Sequence[str]) -> Mapping[str, str]:
        """Return authors' name → layer, by diffusers' converter."""
        return layers_of(native)

    def read_lora(self, path: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return layer → (A, B) of a LoRA file, as diffusers reads it."""
        return read_lora(path)
