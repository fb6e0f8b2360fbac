"""The plugin's keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from trainer_core.errors import ConfigError, Problem
from trainer_core.settings.keys import PluginSettings, key

CHUNK_VARIABLE = "WAN_FEED_FORWARD_CHUNK_SIZE"
LEAST_CHUNK = 256
DEFAULT_CHUNK = 4096

Mechanism = Literal[
    "diffusers",
    "sageattention",
    "flash-attn-2",
    "flash-attn-3",
    "xformers",
    "flex",
    "native-cudnn",
    "native-efficient",
    "native-flash",
    "native-math",
]


class WanSettings(PluginSettings):
    """Weights other than the pipeline's own, how samples are conditioned, how blocks are computed."""

    pretrained_transformer_model_name_or_path: str | None = key(
        None,
        "Transformer to train instead of the pipeline's: a hub repository, a folder, or a single "
        ".safetensors file with diffusers' or the original key names.",
        free=True,
        aliases=("pretrained_transformer_name_or_path",),
    )
    pretrained_transformer_subfolder: str | None = key(
        None,
        'Folder of that transformer in its repository; "none": it lies at the top. Without it the '
        "name of the expert that is trained, transformer or transformer_2.",
        free=True,
    )
    pretrained_vae_model_name_or_path: str | None = key(
        None,
        "VAE to use instead of the pipeline's: a hub repository or a folder, with the VAE in vae/ or "
        "at the top.",
        free=True,
    )
    wan_validation_load_other_stage: bool = key(
        False,
        "Let both experts of Wan 2.2 draw the samples, each on its side of the boundary; otherwise "
        "the trained one draws them alone.",
        free=True,
    )
    wan_one_expert_resident: bool = key(
        False,
        "Keep one of two experts at a time on the accelerator, the other in host memory: half the "
        "memory of frozen weights, for a transfer of one expert each way at every change.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    wan_validation_image: str | None = key(
        None,
        "Image that samples of an image-to-video model begin from; without it the first frame of a "
        "held-out clip, or of a clip that is trained on.",
        free=True,
    )
    wan_validation_last_image: str | None = key(
        None,
        "Image that samples of a first-and-last-frame model end with; without it the last frame of "
        "that clip.",
        free=True,
    )
    wan_first_frame_probability: float = key(
        0.0,
        "Share of clips that TI2V 5B is given the first frame of in training: 0 trains "
        "text-to-video, 1 image-to-video.",
        ge=0,
        le=1,
    )
    wan_force_2_1_time_embedding: bool = key(
        False,
        "One timestep for a clip, as in Wan 2.1, where all tokens of it have the same; and a time "
        "embedding that does not fit is taken from pretrained_model_name_or_path.",
    )
    attention_mechanism: Mechanism = key(
        "diffusers",
        "Kernel of attention; diffusers is PyTorch's own choice. sageattention, which has no backward, "
        "draws the samples only.",
        free=True,
    )
    enable_chunked_feed_forward: bool = key(
        False,
        "Compute feed-forward layers in chunks of tokens, each again in the backward: the same result, "
        "less memory at once.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    feed_forward_chunk_size: int | None = key(
        None,
        f"Tokens of a chunk, {DEFAULT_CHUNK} without it, {LEAST_CHUNK} at the least; the environment's "
        f"{CHUNK_VARIABLE} sets it too and switches chunks on.",
        unit="tokens",
        menu="Training → Memory Optimisation",
        free=True,
        ge=1,
    )

    vae_enable_tiling: bool = key(
        False,
        "Let the VAE work in overlapping tiles of 256 pixels: less memory, slightly other latents and "
        "samples where a clip is larger.",
    )
    vae_enable_slicing: bool = key(
        False,
        "Let the VAE encode the clips of a batch one after another; acts with vae_batch_size above 1.",
        free=True,
    )

    @model_validator(mode="after")
    def _chunks(self) -> WanSettings:
        if self.feed_forward_chunk_size is not None and not self.enable_chunked_feed_forward:
            raise ValueError(
                "feed_forward_chunk_size acts with enable_chunked_feed_forward only; set that too, or "
                "remove it"
            )
        return self


def chunk_of(
    settings: WanSettings, environ: Mapping[str, str] = os.environ
) -> tuple[int, str | None]:
    """Return the tokens of a chunk, 0 for no chunks, and a sentence where it is not what was asked.

    The environment's variable wins, for a quick experiment. Raises ConfigError where it is no number.
    """
    asked, name = settings.feed_forward_chunk_size, "feed_forward_chunk_size"
    if text := environ.get(CHUNK_VARIABLE, "").strip():
        if not text.isdecimal() or int(text) < 1:
            problem = Problem(
                CHUNK_VARIABLE,
                "must be a whole number of tokens, at least 1.",
                value=text,
                where="environment",
            )
            raise ConfigError([problem])
        asked, name = int(text), CHUNK_VARIABLE
    elif not settings.enable_chunked_feed_forward:
        return 0, None
    if asked is None:
        return DEFAULT_CHUNK, None
    if asked < LEAST_CHUNK:
        return LEAST_CHUNK, (
            f"{name} = {asked} counts tokens; chunks of {LEAST_CHUNK} are taken, since smaller ones cost "
            "more time than they save memory"
        )
    return asked, None
