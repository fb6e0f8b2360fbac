"""The image encoder without its contents, for ``trainer plan``: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.planner.sketch import Sketch

VIT_H: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
}
"""Of the encoder that all image-to-video models of Wan 2.1 share."""


@dataclass(frozen=True)
class SketchedImages:
    """Stands in for :class:`trainer_clip.vision.ImageEncoder`, without looking at pixels."""

    model: Any

    def embed(self, frames: Tensor) -> Tensor:
        """Return hidden states (n * L, D) of frames (n, 3, H, W)."""
        size = self.model.config.image_size
        pixels = torch.empty((frames.shape[0], 3, size, size), device=self.model.device)
        with torch.no_grad():
            hidden: Tensor = self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return hidden.flatten(0, 1).cpu()


def build(sketch: Sketch, folder: Path | None) -> SketchedImages:
    """Return the encoder of a folder's config.json; without one, that of Wan 2.1."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    told = VIT_H if folder is None else json.loads((folder / "config.json").read_text("utf-8"))
    return SketchedImages(
        sketch.network(lambda: CLIPVisionModel(CLIPVisionConfig(**told)), dtype=torch.float32)
    )
