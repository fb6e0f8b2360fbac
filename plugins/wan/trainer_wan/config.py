"""The plugin's keys."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings, key


class WanSettings(PluginSettings):
    """The VAE; flavour, weights and precision are core's keys."""

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
