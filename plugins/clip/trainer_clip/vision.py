"""From frames to hidden states, as diffusers' image-to-video pipeline does it.

Knows nothing of the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP's vision tower in float32, with the resizing that it was trained with."""

    processor: Any
    model: Any

    def embed(self, frames: Tensor) -> Tensor:
        """Return (n * 257, 1280) float32 on the CPU for frames (n, 3, H, W) uint8.

        The hidden states before the last layer, image after image.
        """
        import torch
        from PIL import Image

        images = [Image.fromarray(f.permute(1, 2, 0).contiguous().numpy()) for f in frames]
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-2]
        flat: Tensor = hidden.flatten(0, 1).cpu()
        return flat


def load(model: Path, processor: Path, *, device: torch.device) -> ImageEncoder:
    """Return the encoder of two local folders; only safetensors are read."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = CLIPVisionModel.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    resizing = CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
    network.eval().requires_grad_(False).to(device)
    return ImageEncoder(resizing, network)
