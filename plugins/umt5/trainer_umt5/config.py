"""The plugin's keys."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings, key


class Umt5Settings(PluginSettings):
    """Where the text encoder lies."""

    pretrained_t5_model_name_or_path: str | None = key(
        None,
        "Hub repository or folder of the UMT5 text encoder and its tokenizer; without it "
        "pretrained_model_name_or_path, and without that Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
        free=True,
    )
