"""The teacher: DINOv2's patch tokens of single frames. Always float32; nothing is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_crepa.alignment import on_grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1], which DINOv2 was trained on."""


def grid_for(rows: int, columns: int, *, image_size: int, patch: int) -> tuple[int, int]:
    """Return the teacher's (rows, columns) of patches for a clip with that many tokens.

    Their number is about that of a square picture of ``image_size`` pixels, their ratio that of the
    clip, so that nothing is distorted.
    """
    factor = (image_size // patch) / (rows * columns) ** 0.5
    return max(round(rows * factor), 1), max(round(columns * factor), 1)


def kept_grid(ours: tuple[int, int], teachers: tuple[int, int]) -> tuple[int, int]:
    """Return the smaller one of two grids, which is what is kept in the cache."""
    return min(ours, teachers, key=lambda grid: grid[0] * grid[1])


@dataclass
class Teacher:
    """A loaded teacher. first: index of the first patch token, behind the class and register tokens."""

    network: PreTrainedModel
    first: int
    patch: int

    @torch.no_grad()
    def patch_tokens(self, frames: Tensor, grid: tuple[int, int], *, at_once: int = -1) -> Tensor:
        """Return the normalised patch tokens (T, rows, columns, C) float32 of frames (T, 3, H, W)
        uint8.
        """
        device = self.network.device
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
        parts = []
        for part in frames.split(len(frames) if at_once < 0 else at_once):
            pixels = part.to(device).float() / 255
            size = (grid[0] * self.patch, grid[1] * self.patch)
            pixels = torch.nn.functional.interpolate(
                pixels, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
            hidden = self.network(pixel_values=(pixels - mean) / std).last_hidden_state
            parts.append(hidden[:, self.first :].unflatten(1, grid).cpu())
        return torch.cat(parts)


def load(folder: Path, config: dict[str, Any], *, device: torch.device) -> Teacher:
    """Return the teacher of a folder, frozen."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    registers = config["model_type"] == "dinov2_with_registers"
    kind = Dinov2WithRegistersModel if registers else Dinov2Model
    with torch.random.fork_rng(devices=[]):
        network = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    first = 1 + (network.config.num_register_tokens if registers else 0)
    network = network.to(device).eval().requires_grad_(False)
    return Teacher(network, first, network.config.patch_size)


def features(
    teacher: Teacher,
    clip: Tensor,
    *,
    stride: int,
    tokens: tuple[int, int],
    image_size: int,
    at_once: int = -1,
) -> Tensor:
    """Return (T, h, w, C) bfloat16 for a clip (F, 3, H, W) uint8: one frame for each latent frame.

    stride: frames of a latent frame; frames 0, stride, 2 stride, ... are looked at, the first of the clip
    and the last of each later group. tokens: (rows, columns) of the model; (h, w) is the smaller of that
    grid and the teacher's.
    """
    grid = grid_for(*tokens, image_size=image_size, patch=teacher.patch)
    found = teacher.patch_tokens(clip[::stride], grid, at_once=at_once)
    return on_grid(found, *kept_grid(tokens, grid)).bfloat16()
