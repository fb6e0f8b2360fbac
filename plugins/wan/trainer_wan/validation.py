"""Renders the run's prompts: which networks draw, what they begin from, and the pictures."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer_core.errors import ConfigError, Problem
from trainer_core.run import DROP_VAE_ENCODER, MODEL_ASIDE
from trainer_core.types import Artifact
from trainer_wan import attention, vae
from trainer_wan.experts import other
from trainer_wan.flavours import Flavour
from trainer_wan.loading import load_transformer
from trainer_wan.model import network_of
from trainer_wan.resting import Resting
from trainer_wan.sampling import Given, Sampling, sample_latents, settle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trainer_core.run import Run
    from trainer_wan.config import WanSettings
    from trainer_wan.network import WanNetwork
    from trainer_wan.weights import Weights


def render(
    run: Run, weights: Weights, settings: WanSettings, flavour: Flavour, given: Given
) -> list[Artifact]:
    """Return one clip for each of ``run.prompts``; the VAE is loaded for decoding alone."""
    scheduler = weights.config("scheduler")
    sampling = settle(run, scheduler)
    negative = None
    if sampling.guidance > 1:
        text = run.settings.validation_negative_prompt
        negative = run.encoded_caption(text)["text_embeds"]
    with _networks(run, weights, settings, flavour) as networks, ExitStack() as kernels:
        for network in networks.values():
            chosen = attention.sampling(
                network.transformer,
                settings.attention_mechanism,
                device=run.device,
                dtype=run.placement.dtype,
            )
            if (sentence := kernels.enter_context(chosen)) is not None:
                run.say_once(sentence)
        clips = sample_latents(
            networks,
            [run.encoded_caption(prompt.text)["text_embeds"] for prompt in run.prompts],
            negative=negative,
            sampling=sampling,
            scheduler_config=scheduler,
            device=run.device,
            boundary=_boundary(run),
            given=given,
        )
    with run.state.get(MODEL_ASIDE, nullcontext)():
        decoder = vae.load(
            weights.component("vae"),
            device=run.device,
            decoder_only=run.state.get(DROP_VAE_ENCODER, False),
            tiling=settings.vae_enable_tiling,
        )
        return [
            Artifact(
                name=prompt.name,
                frames=vae.decode(decoder, latents).numpy(),
                fps=run.spec.fps,
                caption=prompt.text,
            )
            for prompt, latents in zip(run.prompts, clips, strict=True)
        ]


def _boundary(run: Run) -> float | None:
    """Return the noise level at which the experts change over, None where there is one for all."""
    first = run.spec.experts[0]
    return first.sigma_min or (first.sigma_max if first.sigma_max < 1 else None)


@contextmanager
def _networks(
    run: Run, weights: Weights, settings: WanSettings, flavour: Flavour
) -> Iterator[Mapping[str, WanNetwork]]:
    """Yield what draws the samples: all trained experts, or with the other stage loaded both."""
    model: Any = run.model
    networks = {role: model.bare(role) for role in flavour.roles}
    if settings.wan_validation_load_other_stage and len(networks) == 1:
        role = other(flavour.roles[0])
        files = weights.transformer(role, own=False)
        transformer, _ = load_transformer(files, dtype=run.placement.dtype)
        # nobody moves the blocks of a network that is here for a moment
        placement = replace(run.placement, blocks=None)
        if settings.wan_one_expert_resident:  # it comes when the trained one has gone
            placement = replace(placement, blocks=torch.device("cpu"))
        networks[role] = network_of(transformer, placement=placement)
    resting = None
    if settings.wan_one_expert_resident and len(flavour.roles) == 1:
        resting = Resting(networks, device=run.device)
    try:
        yield networks
    finally:
        if resting is not None:
            resting.wake(flavour.roles[0])
            resting.end()
        networks.clear()  # the other expert's memory ends here


def given_for(run: Run, settings: WanSettings, flavour: Flavour, scheduler: Any) -> Given:
    """Return what samples begin from: the frames of ``wan_validation_image``, or of a clip.

    Without the key it is the first (and for FLF2V the last) frame of the first held-out clip, or,
    where nothing is held out, of the first clip.
    """
    names = ["condition"] if flavour.given_frames else []
    if flavour.task == "ti2v" and settings.wan_first_frame_probability > 0:
        names = ["first_frame"]
    if flavour.uses_clip:
        names.append("image_embeds")
    if not names:
        return Given()
    sampling = settle(run, scheduler)
    found = run.encoded_pixels(_start(run, settings, flavour, sampling), tuple(names))
    return Given(**{name: tensor[None] for name, tensor in found.items()})


def _start(run: Run, settings: WanSettings, flavour: Flavour, sampling: Sampling) -> Tensor:
    """Return a clip (F, 3, H, W) uint8 of a sample's size whose given frames are filled in."""
    size = (sampling.width, sampling.height)
    clip = torch.zeros(sampling.frames, 3, sampling.height, sampling.width, dtype=torch.uint8)
    example = None
    paths = {0: settings.wan_validation_image}
    if "last" in flavour.given_frames:
        paths[-1] = settings.wan_validation_last_image
    for place, path in paths.items():
        if path is not None:
            clip[place] = _fitted(_opened(path, place), size)
            continue
        if example is None:
            example = run.example_clip()
            run.say_once(
                "samples begin from a clip of the data; wan_validation_image names another"
            )
        clip[place] = _fitted(_picture(example[place]), size)
    return clip


def _opened(path: str, place: int) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(path).expanduser()) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        key = "wan_validation_last_image" if place else "wan_validation_image"
        raise ConfigError(
            [Problem(key, f"cannot be read: {error}.", value=path, way_out="Name an image file.")]
        ) from error


def _picture(frame: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


def _fitted(image: Any, size: tuple[int, int]) -> Tensor:
    """Return an image as (3, H, W) uint8 that covers the size, what stands over cut off evenly."""
    import numpy as np
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
