"""Telling what the settings of a run are, and what keys there are."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer_core.catalogue import Catalogue
from trainer_core.files import write_json
from trainer_core.settings import phrases
from trainer_core.settings.core import CoreSettings
from trainer_core.settings.keys import PluginSettings
from trainer_core.settings.load import Resolved
from trainer_core.settings.owners import extra
from trainer_core.settings.validate import shown

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class KeyRow:
    """What a reference page says about a key. ``default``: as text, "required" without one."""

    name: str
    about: str
    default: str
    allowed: str
    unit: str
    menu: str
    free: bool
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class KeyGroup:
    """The keys of one theme of core, or of one plugin (``plugin`` empty for core)."""

    title: str
    plugin: str
    rows: tuple[KeyRow, ...]


def explain(resolved: Resolved) -> dict[str, Any]:
    """Return what a run folder's ``settings.json`` holds: values, origins, plugins and versions."""
    return {
        "settings": resolved.resolved(),
        "origins": dict(resolved.origins),
        "plugins": [
            {
                "name": choice.name,
                "why": choice.why,
                "version": resolved.entries[choice.name].version,
                "distribution": resolved.entries[choice.name].distribution,
            }
            for choice in resolved.choices
        ],
        "unused": list(resolved.unused),
        "trainer": core_version(),
        "python": platform.python_version(),
    }


def write_settings(resolved: Resolved, folder: Path) -> None:
    """Write ``settings.json`` into a folder, whole or not at all."""
    write_json(folder / SETTINGS_FILE, explain(resolved))


def plugin_versions(resolved: Resolved) -> dict[str, str]:
    """Return plugin → version of those that a resume may not change (trackers excepted)."""
    return {name: resolved.entries[name].version for name in resolved.lasting_plugins()}


def core_version() -> str:
    """Return the version of trainer-core, empty if it is not installed as a distribution."""
    try:
        return metadata.version("trainer-core")
    except metadata.PackageNotFoundError:
        return ""


def groups(catalogue: Catalogue) -> list[KeyGroup]:
    """Return all keys: core's by theme, then each usable plugin's."""
    themes = [
        base
        for base in CoreSettings.__bases__
        if issubclass(base, PluginSettings) and base is not PluginSettings
    ]
    found = [KeyGroup(_first_line(theme), "", tuple(_rows(theme))) for theme in themes]
    for entry in catalogue.usable():
        if entry.info.settings is not None and entry.keys:
            title = f"Plugin {entry.name}: {_first_line(entry.info.settings)}"
            found.append(KeyGroup(title, entry.name, tuple(_rows(entry.info.settings))))
    return found


def _first_line(model: type[BaseModel]) -> str:
    lines = (model.__doc__ or model.__name__).strip().splitlines()
    return lines[0].rstrip(".")


def _rows(model: type[BaseModel]) -> Iterator[KeyRow]:
    for name, field in model.model_fields.items():
        aliases = extra(field, "aliases")
        yield KeyRow(
            name=name,
            about=field.description or "",
            default=default_text(field),
            allowed=phrases.allowed(field),
            unit=str(extra(field, "unit") or ""),
            menu=str(extra(field, "menu") or ""),
            free=bool(extra(field, "free")),
            aliases=tuple(map(str, aliases)) if isinstance(aliases, list) else (),
        )


def default_text(field: FieldInfo) -> str:
    """Return a default as it stands in a config file; "required" where there is none."""
    if field.is_required():
        return "required"
    value = shown(field, field.get_default(call_default_factory=True))
    if value is None or value is PydanticUndefined:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "empty"
    return '""' if value == "" else str(value)


def settings_markdown(catalogue: Catalogue) -> str:
    """Return ``docs/reference/settings.md``: every key of core and of these plugins."""
    lines = [
        "# Settings",
        "",
        "Generated from the settings models. Each key can stand in the config file, in the",
        "environment as `TRAINER_<KEY>` and on the command line as `--key value`; the later of",
        "these wins. A resumed run may change the keys marked *free*.",
    ]
    for group in groups(catalogue):
        lines += ["", f"## {group.title}", "", "| key | default | allowed | what it does |"]
        lines += ["|---|---|---|---|", *(_markdown_row(row) for row in group.rows)]
    return "\n".join(lines) + "\n"


def _markdown_row(row: KeyRow) -> str:
    notes = [row.about]
    if row.aliases:
        notes.append(f"Also spelled {', '.join(f'`{name}`' for name in row.aliases)}.")
    if row.unit:
        notes.append(f"In {row.unit}.")
    if row.free:
        notes.append("*free*")
    cells = [f"`{row.name}`", f"`{row.default}`", row.allowed, " ".join(notes)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def json_schema(catalogue: Catalogue) -> dict[str, Any]:
    """Return a JSON schema of config files for editors; a key may carry a leading ``--``."""
    models = [CoreSettings, *(entry.info.settings for entry in catalogue.usable())]
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for model in models:
        if model is None:
            continue
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.get("$defs", {})
        properties |= _without_notes(schema.get("properties", {}))
    dashed = {f"--{name}": {"$ref": f"#/properties/{name}"} for name in properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trainer config",
        "type": "object",
        "properties": properties | dashed,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _without_notes(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties without our own notes on them."""
    notes: Iterable[str] = ("unit", "free", "secret", "menu", "aliases")
    return {
        name: {key: value for key, value in schema.items() if key not in notes}
        for name, schema in properties.items()
    }
