"""Teaches the tiny VAE to reconstruct clips. Plain PyTorch: the trainer itself trains no VAEs.

Loss: absolute plus squared error of pixels in [-1, 1]. The latents get a little noise before they are
decoded, which keeps the decoder smooth around them (a transformer never hits them exactly), and a small
penalty on their size. Weights are averaged; the averaged ones are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_core.files import write_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

CONFIG = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
NOISE = 0.05
"""Deviation of the noise on latents, in units of their own deviation."""
SIZE_PENALTY = 1e-4
SMALL_VARIANCE = -8.0
"""Logarithm of the posterior's variance, which is not trained: the mode is what is used."""


@dataclass(frozen=True)
class Stage:
    """A part of the training. frames, size: of each excerpt, in frames and pixels; batch: excerpts a
    step.
    """

    steps: int
    frames: int
    size: int
    batch: int


STAGES = (Stage(800, 5, 32, 12), Stage(2600, 17, 32, 4), Stage(600, 17, 64, 2))
"""Short excerpts first, for many in a step; whole clips soon, since every later frame is decoded from the
memory of the ones before it, which an excerpt of 5 frames never shows."""
PEAK, WARM_UP, DECAY = 2e-3, 200, 0.998


def new_vae(seed: int = 0) -> AutoencoderKLWan:
    """Return an untrained VAE."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        vae = AutoencoderKLWan(**CONFIG)
    half = CONFIG["z_dim"]
    with torch.no_grad():
        vae.quant_conv.weight[half:].zero_()
        vae.quant_conv.bias[half:].fill_(SMALL_VARIANCE)
    return vae


def rate(step: int, total: int) -> float:
    """Return the learning rate of a step from 0: a warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (total - WARM_UP)))


def excerpt(clips: Sequence[Tensor], stage: Stage, draw: torch.Generator) -> Tensor:
    """Return (B, 3, F, H, W) in [-1, 1] from clips (17, 3, H, W) uint8."""
    parts, ends = [], (stage.frames, stage.size, stage.size)
    for _ in range(stage.batch):
        clip = clips[int(torch.randint(len(clips), (), generator=draw))]
        limits = [n - m + 1 for n, m in zip(clip[:, 0].shape, ends, strict=True)]
        f, y, x = (int(torch.randint(limit, (), generator=draw)) for limit in limits)
        parts.append(clip[f : f + ends[0], :, y : y + ends[1], x : x + ends[2]])
    return torch.stack(parts).transpose(1, 2).float() / 127.5 - 1


def loss_of(vae: AutoencoderKLWan, pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Return the loss (0-d) of pixels (B, 3, F, H, W)."""
    latents = vae.encode(pixels).latent_dist.mode()
    noise = torch.randn(latents.shape, generator=draw)
    error = vae.decode(latents + NOISE * latents.detach().std() * noise).sample - pixels
    return error.abs().mean() + error.square().mean() + SIZE_PENALTY * latents.square().mean()


@dataclass
class Training:
    """The state of a VAE in training."""

    vae: AutoencoderKLWan
    optimizer: torch.optim.AdamW
    averaged: dict[str, Tensor]
    step: int = 0

    @classmethod
    def begin(cls) -> Training:
        """Return the state before the first step."""
        vae = new_vae().train()
        trained = list(vae.parameters())
        optimizer = torch.optim.AdamW(trained, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0)
        return cls(vae, optimizer, {k: v.detach().clone() for k, v in vae.state_dict().items()})

    def advance(self, clips: Sequence[Tensor], stage: Stage, total: int) -> float:
        """Do one step; return its loss."""
        draw = torch.Generator().manual_seed(self.step)
        loss = loss_of(self.vae, excerpt(clips, stage, draw), draw)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        share = 1 - min(DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.vae.state_dict().items():
            self.averaged[name].lerp_(value, share)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything that goes on from here."""
        state = {f"vae.{k}": v for k, v in self.vae.state_dict().items()}
        state |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        write_tensors(path, {**state, "step": torch.tensor(self.step)})

    @classmethod
    def load(cls, path: Path) -> Training:
        """Return the state that :meth:`save` wrote."""
        from safetensors.torch import load_file

        state, training = load_file(path), cls.begin()
        training.vae.load_state_dict(_below("vae.", state))
        training.averaged = {k: v.clone() for k, v in _below("averaged.", state).items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer.", state).items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        training.step = int(state["step"])
        return training


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def steps_done(state: Path) -> int:
    """Return the steps that a state file has behind it, 0 where there is none."""
    from safetensors import safe_open

    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        return int(file.get_tensor("step"))


def train(
    clips: Sequence[Tensor],
    state: Path,
    *,
    stages: Sequence[Stage] = STAGES,
    save_every: int = 100,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> AutoencoderKLWan:
    """Train to the end, or go on from ``state``; return the VAE with averaged weights, statistics set.

    clips: (17, 3, H, W) uint8. told: called with the step and its loss.
    """
    training = Training.load(state) if state.exists() else Training.begin()
    total = sum(stage.steps for stage in stages)
    ends = [sum(stage.steps for stage in stages[: k + 1]) for k in range(len(stages))]
    while training.step < total:
        stage = next(s for s, end in zip(stages, ends, strict=True) if training.step < end)
        loss = training.advance(clips, stage, total)
        told(training.step, loss)
        if training.step % save_every == 0 or training.step == total:
            training.save(state)
    vae = training.vae
    vae.load_state_dict(training.averaged)
    set_statistics(vae.eval(), clips)
    return vae


@torch.no_grad()
def set_statistics(vae: AutoencoderKLWan, clips: Sequence[Tensor], most: int = 256) -> None:
    """Measure mean and deviation of each latent channel over clips and write them into the config."""
    every = max(len(clips) // most, 1)
    chosen = torch.stack(list(clips[::every])).transpose(1, 2).float() / 127.5 - 1
    parts = [vae.encode(part).latent_dist.mode() for part in chosen.split(8)]
    channels = torch.cat(parts).transpose(0, 1).flatten(1)  # (C, all)
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in channels.mean(1).tolist()],
        latents_std=[max(round(value, 4), 1e-3) for value in channels.std(1).tolist()],
    )


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: Sequence[Tensor]) -> float:
    """Return the mean over clips of the peak signal-to-noise ratio, in dB, pixels in [0, 1]."""
    found: list[Any] = []
    for clip in clips:
        pixels = clip[None].transpose(1, 2).float() / 127.5 - 1
        again = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((again - pixels) / 2).square().mean()
        found.append(-10 * math.log10(float(error)))
    return sum(found) / len(found)
