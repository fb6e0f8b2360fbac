"""The text encoder without its contents, for ``trainer plan``: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_umt5.text import MAX_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.planner.sketch import Sketch

XXL: Mapping[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 256384,
}
"""Of the encoder that all Wan models share."""


@dataclass(frozen=True)
class SketchedText:
    """Stands in for :class:`trainer_umt5.text.TextEncoder`, without a tokenizer."""

    model: Any

    def embed(self, caption: str) -> Tensor:
        """Return hidden states (512, D) of a caption of the largest length."""
        ids = torch.empty((1, MAX_TOKENS), dtype=torch.int64, device=self.model.device)
        with torch.no_grad():
            hidden: Tensor = self.model(ids, torch.ones_like(ids)).last_hidden_state
        return hidden[0].cpu()


def build(sketch: Sketch, folder: Path | None, *, dtype: torch.dtype) -> SketchedText:
    """Return the encoder of a folder's config.json; without one, that of Wan."""
    from transformers import UMT5Config, UMT5EncoderModel

    told = XXL if folder is None else json.loads((folder / "config.json").read_text("utf-8"))
    return SketchedText(sketch.network(lambda: UMT5EncoderModel(UMT5Config(**told)), dtype=dtype))
