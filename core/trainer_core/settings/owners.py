"""Which names of keys belong to whom, whether or not their owner is installed.

A plugin's keys begin with its name. The keys that people know from the quick start and that do not
are listed in ``names.json`` with the plugin that is expected to own them; any plugin may own those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def read_table(name: str) -> dict[str, object]:
    """Return one of the JSON tables that lie beside this module."""
    text = resources.files("trainer_core.settings").joinpath(name).read_text(encoding="utf-8")
    table: dict[str, object] = json.loads(text)
    return table


def expected_owner(key: str) -> str | None:
    """Return the plugin that is known to own ``key``, or None."""
    owner = read_table("names.json").get(key)
    return str(owner) if owner is not None else None


def misnamed(plugin: str, keys: Iterable[str]) -> list[str]:
    """Return the keys that neither begin with the plugin's name nor are known names."""
    prefix = plugin.replace("-", "_")
    odd = [key for key in keys if key != prefix and not key.startswith(f"{prefix}_")]
    if not odd:
        return []
    known = read_table("names.json")
    return [key for key in odd if key not in known]


def extra(field: FieldInfo, name: str) -> object:
    """Return what :func:`trainer_core.settings.keys.key` noted about a field."""
    return field.json_schema_extra.get(name) if isinstance(field.json_schema_extra, dict) else None


def spellings(model: type[BaseModel]) -> Mapping[str, str]:
    """Return every accepted spelling of a model's keys → the key."""
    found = {name: name for name in model.model_fields}
    for name, field in model.model_fields.items():
        aliases = extra(field, "aliases")
        found |= dict.fromkeys(aliases if isinstance(aliases, list) else [], name)
    return found
