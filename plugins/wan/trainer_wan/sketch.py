"""The networks of a flavour without their contents, for ``trainer plan``: nothing is downloaded.

Beside the networks: what is done with them while samples are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer_core.planner.occasion import Occasion
from trainer_core.run import DROP_VAE_ENCODER, MODEL_ASIDE
from trainer_wan.flavours import Flavour
from trainer_wan.model import IMAGE_TOKENS, WanModel, network_of
from trainer_wan.sampling import TEXT_TOKENS, Given, denoised, settle
from trainer_wan.vae import decode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from trainer_core.planner.sketch import Sketch
    from trainer_core.run import Run
    from trainer_wan.config import WanSettings
    from trainer_wan.weights import Weights

VAE_16: Mapping[str, Any] = {}
"""Of Wan 2.1 and of the 14B models of 2.2: diffusers' own defaults."""
VAE_48: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""Of TI2V-5B; the statistics do not matter without contents."""
SCHEDULER: Mapping[str, Any] = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}


def config_of(component: str, flavour: Flavour, weights: Weights | None) -> Mapping[str, Any]:
    """Return a component's configuration: that of the files, or without them the flavour's."""
    if weights is not None:
        return weights.config(component)
    if component == "vae":
        return VAE_48 if flavour.shape.out_channels == VAE_48["z_dim"] else VAE_16
    if component == "scheduler":
        return SCHEDULER
    shape = {name: value for name, value in vars(flavour.shape).items() if value is not None}
    if flavour.shape.image_dim is not None:
        shape["added_kv_proj_dim"] = shape["num_attention_heads"] * shape["attention_head_dim"]
    return shape


def model(
    run: Run,
    flavour: Flavour,
    weights: Weights | None,
    *,
    one_time: bool = False,
) -> WanModel:
    """Return the model that ``load_model`` gives, with transformers that have no contents.

    Which clips have a frame given is a draw, and draws have no contents either: all have it, the dearer
    case.
    """
    from diffusers import WanTransformer3DModel

    assert run.sketch is not None
    placement, settings = run.placement, run.settings
    train_all = settings.model_type == "full"
    networks = {}
    for role in flavour.roles:
        config = dict(config_of(role, flavour, weights))
        transformer = run.sketch.network(
            lambda config=config: WanTransformer3DModel.from_config(config),
            dtype=placement.trained_dtype if train_all else placement.frozen_dtype,
            keep=WanTransformer3DModel._keep_in_fp32_modules,
        )
        networks[role] = network_of(
            transformer,
            placement=placement,
            train_all=train_all,
            one_time=one_time,
        )
    scheduler = config_of("scheduler", flavour, weights)
    return WanModel(run.spec, networks, scheduler=scheduler)


def vae(sketch: Sketch, flavour: Flavour, weights: Weights | None) -> AutoencoderKLWan:
    """Return the VAE, in float32."""
    from diffusers import AutoencoderKLWan

    config = dict(config_of("vae", flavour, weights))
    return sketch.network(lambda: AutoencoderKLWan.from_config(config), dtype=torch.float32)


def samples(
    run: Run, flavour: Flavour, weights: Weights | None, settings: WanSettings
) -> Iterator[Occasion]:
    """Yield what rendering the prompts takes: one pass of the denoiser, and decoding one clip."""
    sampling = settle(run, config_of("scheduler", flavour, weights))
    edges = (sampling.height // sampling.vae_factor, sampling.width // sampling.vae_factor)
    frames = (sampling.frames - 1) // run.spec.frame_stride + 1
    size = (frames, *edges)  # of latents
    first = flavour.task == "ti2v" and settings.wan_first_frame_probability > 0
    yield Occasion(
        "samples, denoising",
        lambda: _denoise(run, flavour, size, first_frame=first),
        tuple(_others(run, flavour, weights, settings)),
    )
    assert run.sketch is not None
    decoder = vae(run.sketch, flavour, weights)
    if run.state.get(DROP_VAE_ENCODER, False):
        decoder.encoder = decoder.quant_conv = None
    if settings.vae_enable_tiling:
        decoder.enable_tiling()
    yield Occasion(
        "samples, decoding",
        lambda: decode(decoder, torch.empty(decoder.config.z_dim, *size)),
        (decoder,),
        aside=MODEL_ASIDE in run.state,
    )


def _others(
    run: Run, flavour: Flavour, weights: Weights | None, settings: WanSettings
) -> Iterator[torch.nn.Module]:
    """Yield the expert that is loaded for samples alone, unless it takes the place of the trained one."""
    if not settings.wan_validation_load_other_stage or len(flavour.roles) > 1:
        return
    if settings.wan_one_expert_resident:
        return
    from diffusers import WanTransformer3DModel

    assert run.sketch is not None
    config = dict(config_of(flavour.roles[0], flavour, weights))
    yield run.sketch.network(
        lambda: WanTransformer3DModel.from_config(config),
        dtype=run.placement.frozen_dtype,
        keep=WanTransformer3DModel._keep_in_fp32_modules,
    )


def _denoise(run: Run, flavour: Flavour, size: tuple[int, ...], *, first_frame: bool) -> None:
    """Call the denoiser once for a clip whose latents are of that size (f, h, w)."""
    model: Any = run.model
    network = model.bare(flavour.roles[0])
    config, given = network.transformer.config, {}
    channels = config.out_channels
    if flavour.given_frames:
        joined = config.in_channels - channels
        given["condition"] = torch.empty(1, joined, *size, device=run.device)
    if flavour.uses_clip:
        tokens = IMAGE_TOKENS * len(flavour.given_frames)
        given["image_embeds"] = torch.empty(1, tokens, config.image_dim, device=run.device)
    if first_frame:
        given["first_frame"] = torch.empty(1, channels, 1, *size[1:], device=run.device)
    denoised(
        network,
        torch.empty(1, channels, *size, device=run.device),
        torch.empty(1, device=run.device),
        torch.empty(1, TEXT_TOKENS, config.text_dim, device=run.device),
        Given(**given),
    )
