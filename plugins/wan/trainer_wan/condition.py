"""What a model is given beside text and noise: frames of the clip, as diffusers' pipelines give them.

Two forms. Concatenated (I2V and FLF2V of Wan 2.1, I2V of 2.2): the VAE's latents of the given frames
with zeros between, and four mask channels that say which frames are given. Replaced (TI2V of 2.2): the
first latent frame is the given one, at timestep 0. Knows nothing of the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

MASK_CHANNELS = 4


def in_range(frame: Tensor) -> Tensor:
    """Return a frame (3, H, W) uint8 as float32 in [-1, 1], bit for bit as diffusers' processor."""
    return 2.0 * (frame.float() / 255.0) - 1.0


def given_mask(num_latent_frames: int, height: int, width: int, *, last: bool) -> Tensor:
    """Return the mask (4, f, h, w) float32: 1 where a frame is given.

    Channel c of latent frame k stands for frame 4 k + c - 3; the first frame fills all four of its own.
    """
    mask = torch.zeros(MASK_CHANNELS, num_latent_frames, height, width)
    mask[:, 0] = 1
    if last:
        mask[-1, -1] = 1
    return mask


@torch.no_grad()
def encoded(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Return the normalised latents (C, f, h, w) of pixels (3, F, H, W), the posterior's mode.

    In the order of diffusers' pipelines, which multiply by 1 / latents_std: the same bits.
    """
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
    latents = vae.encode(pixels[None].to(vae.device)).latent_dist.mode()
    normalised: Tensor = ((latents - mean) * inverse_std)[0].cpu()
    return normalised


def concatenated(vae: AutoencoderKLWan, clip: Tensor, *, last: bool) -> Tensor:
    """Return mask and latents (4 + C, f, h, w) float32 for a clip (F, 3, H, W) uint8.

    Only its first frame and, with ``last``, its last one are looked at.
    """
    num_frames = clip.shape[0]
    last = last and num_frames > 1
    pixels = torch.zeros(3, num_frames, *clip.shape[-2:])
    pixels[:, 0] = in_range(clip[0])
    if last:
        pixels[:, -1] = in_range(clip[-1])
    latents = encoded(vae, pixels)
    return torch.cat([given_mask(*latents.shape[1:], last=last), latents])


def first_frame(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Return the latents (C, 1, h, w) float32 of the first frame of a clip (F, 3, H, W) uint8."""
    return encoded(vae, in_range(clip[0])[:, None])


def token_timesteps(t: Tensor, mask: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Return a timestep for each token, (B, N): ``t`` (B,), 0 where the mask is 0.

    mask: (B, 1, F, H, W) of latents, 1 where there is noise.
    """
    per_pixel = mask[:, 0] * t.view(-1, 1, 1, 1)  # (B, F, H, W)
    return per_pixel[:, :: patch[0], :: patch[1], :: patch[2]].flatten(1)


def noise_mask(x_t: Tensor, given: Tensor | None) -> Tensor:
    """Return (B, 1, F, H, W) in the dtype of x_t: 0 in the first frame of the samples that have it
    given, 1 elsewhere. given: (B,) bool, None for no sample.
    """
    mask = x_t.new_ones(x_t.shape[0], 1, *x_t.shape[2:])
    if given is not None:
        mask[:, :, 0] = (~given).to(mask.dtype).view(-1, 1, 1, 1)
    return mask
