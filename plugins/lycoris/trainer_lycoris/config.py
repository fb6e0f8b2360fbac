"""The plugin's key."""

from __future__ import annotations

from typing import Any

from trainer_core.settings.keys import PluginSettings, key


class LycorisSettings(PluginSettings):
    """Kind, size and place of the adapter."""

    lycoris_config: str | dict[str, Any] = key(
        about="JSON file, or the object itself, that tells what is trained: algo (lokr, loha, locon or "
        "full), multiplier (1), linear_dim, linear_alpha, factor, apply_preset and more; the plugin's "
        "README lists them. A resumed run must have the same content."
    )
