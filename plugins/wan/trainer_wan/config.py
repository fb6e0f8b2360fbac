"""The plugin's keys."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings


class WanSettings(PluginSettings):
    """None yet: flavour, weights and precision are core's keys."""
