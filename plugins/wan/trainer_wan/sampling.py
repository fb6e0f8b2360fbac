"""Renders prompts with diffusers' own pipeline, UniPC, and the training forward as its denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.errors import ConfigError, Problem
from trainer_wan.network import WanNetwork

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler

    from trainer_core.run import Run

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How samples are made. width, height: pixels. shift: UniPC's flow_shift."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    shift: float
    seed: int


def settle(run: Run, scheduler_config: Mapping[str, Any]) -> Sampling:
    """Return the run's validation settings, made legal for the model; changes are said once."""
    settings, spec = run.settings, run.spec
    frames = spec.snap_frames(settings.validation_num_video_frames)
    if frames != settings.validation_num_video_frames:
        run.say_once(
            f"validation_num_video_frames = {settings.validation_num_video_frames} is rendered as "
            f"{frames} frames ({spec.frame_stride} n + 1)"
        )
    asked = settings.validation_size
    width, height = (edge // spec.alignment * spec.alignment for edge in asked)
    if not width or not height:
        raise ConfigError(
            [
                Problem(
                    "validation_resolution",
                    f"an edge is shorter than {spec.alignment} pixels.",
                    value=settings.validation_resolution,
                    way_out=f"Take multiples of {spec.alignment}.",
                )
            ]
        )
    if (width, height) != asked:
        run.say_once(
            f"validation_resolution = {settings.validation_resolution} is rendered as "
            f"{width}x{height} (multiples of {spec.alignment})"
        )
    own = scheduler_config.get("flow_shift") or scheduler_config.get("shift") or 1.0
    seed = settings.validation_seed
    return Sampling(
        width=width,
        height=height,
        frames=frames,
        steps=settings.validation_num_inference_steps,
        guidance=settings.validation_guidance,
        shift=float(own if settings.flow_schedule_shift is None else settings.flow_schedule_shift),
        seed=settings.seed if seed is None else seed,
    )


def scheduler_for(config: Mapping[str, Any], sampling: Sampling) -> UniPCMultistepScheduler:
    """Return UniPC for flow matching, with the shift of ``sampling``."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler.from_config(
        dict(config),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=sampling.shift,
    )


class _Denoiser(nn.Module):
    """A network in the place of the pipeline's transformer, so that samples come from the very
    forward that is trained: autocast, adapters and residency alike.
    """

    def __init__(self, network: WanNetwork, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device  # not that of some weight, which may lie elsewhere for a while

    @property
    def config(self) -> Any:
        return self.network.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # of what goes in: the network casts by itself

    @contextmanager
    def cache_context(self, name: str, **about: Any) -> Iterator[None]:
        yield

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        **options: Any,
    ) -> tuple[Tensor]:
        velocity, _ = self.network.velocity(hidden_states, timestep, encoder_hidden_states)
        return (velocity,)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back into its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def sample_latents(
    network: WanNetwork,
    texts: Sequence[Tensor],
    *,
    negative: Tensor | None,
    sampling: Sampling,
    scheduler_config: Mapping[str, Any],
    device: torch.device,
) -> list[Tensor]:
    """Return the latents (C, f, h, w) float32 of each text embedding (L, text_dim), on the CPU.

    negative: embedding that guidance leads away from; None where ``sampling.guidance`` is 1 or
    less, which saves its pass. Each text starts from the same noise. Global random state is
    left as it was.
    """
    from diffusers import WanPipeline

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _evaluating(network), torch.no_grad():
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler_for(scheduler_config, sampling),
            transformer=_Denoiser(network, device),
        )
        pipeline.set_progress_bar_config(disable=True)
        found = []
        for text in texts:
            latents = pipeline(
                prompt_embeds=_padded(text).to(device),
                negative_prompt_embeds=None if negative is None else _padded(negative).to(device),
                height=sampling.height,
                width=sampling.width,
                num_frames=sampling.frames,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance if negative is not None else 1.0,
                generator=torch.Generator().manual_seed(sampling.seed),
                output_type="latent",
                return_dict=False,
            )[0]
            found.append(latents[0].float().cpu())
    return found


def _padded(text: Tensor) -> Tensor:
    """Return an embedding as (1, 512, text_dim) float32."""
    padded = text.new_zeros(TEXT_TOKENS, text.shape[-1], dtype=torch.float32)
    padded[: text.shape[0]] = text[:TEXT_TOKENS]
    return padded[None]
