"""The VAE: pixels to normalised latents and back. Always float32; nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_core.errors import DataError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def load(
    folder: Path,
    *,
    device: torch.device,
    decoder_only: bool = False,
    tiling: bool = False,
    slicing: bool = False,
) -> AutoencoderKLWan:
    """Return the VAE of a folder, frozen, in float32.

    decoder_only: without the layers that only encoding needs, which are never on the device. tiling:
    clips above 256 pixels go through it in overlapping tiles, blended. slicing: one clip at a time.
    """
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    if decoder_only:
        vae.encoder = vae.quant_conv = None
    return vae.to(device).eval().requires_grad_(False)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a VAE's config.json that decide its output."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
    return mean, std


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Sequence[Tensor]) -> list[Tensor]:
    """Return the normalised latents (C, f, h, w) float32 of clips (F, 3, H, W) uint8, on the CPU.

    The posterior's mode, minus latents_mean, over latents_std. DataError for a length that is not
    4n + 1 or a size that is not a multiple of the VAE's factor: the VAE would cut it silently.
    """
    in_time, in_space = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    for clip in clips:
        frames, _, height, width = clip.shape
        if (frames - 1) % in_time or height % in_space or width % in_space:
            raise DataError(
                f"a clip of {frames} frames, {width}x{height}, does not fit the VAE: frames must "
                f"be {in_time} n + 1, width and height multiples of {in_space}"
            )
    pixels = torch.stack(list(clips)).to(vae.device)  # (B, F, 3, H, W)
    pixels = pixels.transpose(1, 2).float() / 127.5 - 1
    mean, std = _statistics(vae)
    latents = (vae.encode(pixels).latent_dist.mode() - mean) / std  # (B, C, f, h, w)
    return list(latents.cpu())


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the frames (F, H, W, 3) uint8, on the CPU, of one clip's latents (C, f, h, w)."""
    mean, std = _statistics(vae)
    pixels = vae.decode(latents[None].to(vae.device) * std + mean).sample[0]  # (3, F, H, W)
    pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
