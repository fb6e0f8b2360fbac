"""The plugin's keys."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings, key


class ClipSettings(PluginSettings):
    """Where the image encoder lies."""

    clip_pretrained_model_name_or_path: str | None = key(
        None,
        "Hub repository or folder with image_encoder/ and image_processor/; without it "
        "pretrained_model_name_or_path, and where that has none "
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers.",
        free=True,
    )
