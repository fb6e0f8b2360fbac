"""Renders prompts with diffusers' own pipeline, UniPC, and the training forward as its denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.errors import ConfigError, Problem
from trainer_wan.flavours import HIGH, LOW
from trainer_wan.network import WanNetwork

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler

    from trainer_core.run import Run

TEXT_TOKENS = 512
PATCH = 2


@dataclass(frozen=True)
class Sampling:
    """How samples are made. width, height: pixels, vae_factor of them a latent. shift: UniPC's
    flow_shift.
    """

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    shift: float
    seed: int
    vae_factor: int = 8


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
        vae_factor=spec.alignment // PATCH,
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


@dataclass(frozen=True)
class Given:
    """What samples begin from, each with a batch axis of 1: see :meth:`WanNetwork.forward`."""

    condition: Tensor | None = None
    image_embeds: Tensor | None = None
    first_frame: Tensor | None = None

    def to(self, device: torch.device) -> Given:
        """Return it on a device."""
        parts = (self.condition, self.image_embeds, self.first_frame)
        return Given(*(None if part is None else part.to(device) for part in parts))


class _Denoiser(nn.Module):
    """A network in the place of the pipeline's transformer, so that samples come from the very
    forward that is trained: autocast, adapters and residency alike.
    """

    def __init__(self, network: WanNetwork, given: Given, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.given = given
        self.device = device  # not that of some weight, which may lie elsewhere for a while

    @property
    def config(self) -> Any:
        """What the pipeline asks for: what is joined to the noise is joined in here."""
        own = self.network.transformer.config
        return SimpleNamespace(patch_size=own.patch_size, in_channels=own.out_channels)

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
        return (denoised(self.network, hidden_states, timestep, encoder_hidden_states, self.given),)


def denoised(
    network: WanNetwork, latents: Tensor, timestep: Tensor, text: Tensor, given: Given
) -> Tensor:
    """Return the velocity (1, C, f, h, w) of one clip that begins from what is ``given``."""
    first = given.first_frame
    is_given = None if first is None else torch.ones(1, dtype=torch.bool, device=first.device)
    velocity, _ = network.velocity(
        latents,
        timestep,
        text,
        condition=given.condition,
        image=given.image_embeds,
        first_frame=first,
        given=is_given,
    )
    return velocity


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
    networks: Mapping[str, WanNetwork],
    texts: Sequence[Tensor],
    *,
    negative: Tensor | None,
    sampling: Sampling,
    scheduler_config: Mapping[str, Any],
    device: torch.device,
    boundary: float | None = None,
    given: Given | None = None,
) -> list[Tensor]:
    """Return the latents (C, f, h, w) float32 of each text embedding (L, text_dim), on the CPU.

    networks: one expert, or both by role, which then divide the noise levels at ``boundary``.
    negative: embedding that guidance leads away from; None where ``sampling.guidance`` is 1 or
    less, which saves its pass. Each text starts from the same noise and what is ``given``. Global
    random state is left as it was.
    """
    devices = [device] if device.type == "cuda" else []
    given = (given or Given()).to(device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for network in networks.values():
            stack.enter_context(_evaluating(network))
        stack.enter_context(torch.no_grad())
        pipeline = _pipeline(networks, given, sampling, scheduler_config, device, boundary)
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
            if given.first_frame is not None:
                latents[:, :, :1] = given.first_frame
            found.append(latents[0].float().cpu())
    return found


def _pipeline(
    networks: Mapping[str, WanNetwork],
    given: Given,
    sampling: Sampling,
    scheduler_config: Mapping[str, Any],
    device: torch.device,
    boundary: float | None,
) -> Any:
    from diffusers import WanPipeline

    denoisers = {role: _Denoiser(network, given, device) for role, network in networks.items()}
    alone = next(iter(denoisers.values()))
    both = len(denoisers) > 1
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler_for(scheduler_config, sampling),
        transformer=denoisers[HIGH] if both else alone,
        transformer_2=denoisers[LOW] if both else None,
        boundary_ratio=boundary if both else None,
    )
    pipeline.vae_scale_factor_spatial = sampling.vae_factor
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _padded(text: Tensor) -> Tensor:
    """Return an embedding as (1, 512, text_dim) float32."""
    padded = text.new_zeros(TEXT_TOKENS, text.shape[-1], dtype=torch.float32)
    padded[: text.shape[0]] = text[:TEXT_TOKENS]
    return padded[None]
