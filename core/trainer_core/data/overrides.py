"""Puts values from elsewhere, such as the command line, into the entries of a data backend file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def overridden(entries: list[Any], overrides: Mapping[str, Any]) -> list[Any]:
    """Return the entries with values from elsewhere put in."""
    entries = [dict(entry) if isinstance(entry, Mapping) else entry for entry in entries]
    named = {str(e.get("id")): e for e in entries if isinstance(e, dict)}
    for key, value in overrides.items():
        owner = next((i for i in sorted(named, key=len)[::-1] if key.startswith(f"{i}.")), None)
        targets = [named[owner]] if owner else [
            e for e in named.values() if e.get("dataset_type") in ("video", "image", "eval")
        ]  # fmt: skip
        *parents, last = (key[len(owner) + 1 :] if owner else key).split(".")
        for target in targets:
            for parent in parents:
                target[parent] = dict(target.get(parent) or {})
                target = target[parent]
            target[last] = value
    return entries
