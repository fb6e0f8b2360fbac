"""The plugin's key."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings, key


class ModelOffloadSettings(PluginSettings):
    """Whether components make room for each other."""

    enable_model_cpu_offload: bool = key(
        False,
        "Move the whole model to host memory while samples are decoded, so that the VAE has the "
        "accelerator for itself. Acts on accelerators; excludes enable_group_offload.",
        menu="Training → Memory Optimisation",
        free=True,
    )
