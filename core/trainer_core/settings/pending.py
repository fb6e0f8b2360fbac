"""Keys of known features that are not built yet: refused with a sentence, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from trainer_core.settings.owners import read_table


def pending_sentences() -> Mapping[str, str]:
    """Return key, or ``"key=value"``, → why it is refused and what to do now."""
    table = cast("dict[str, dict[str, str]]", read_table("pending.json"))
    return {key: entry["sentence"] for key, entry in table.items()}


def pending_plugins() -> Mapping[str, str]:
    """Return key, or ``"key=value"``, → the plugin that will own or provide it."""
    table = cast("dict[str, dict[str, str]]", read_table("pending.json"))
    return {key: entry["plugin"] for key, entry in table.items()}
