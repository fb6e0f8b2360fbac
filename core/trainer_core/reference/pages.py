"""All generated pages, from the plugins of one folder and from nothing else that is installed."""

from __future__ import annotations

import json
from pathlib import Path

from trainer_core.catalogue import Catalogue
from trainer_core.errors import PluginError
from trainer_core.reference.backends import backends_page
from trainer_core.reference.hooks import hooks_page
from trainer_core.settings.explain import json_schema, settings_markdown
from trainer_core.settings.pending import pending_plugins, pending_sentences


def first_party(folder: Path) -> Catalogue:
    """Return the installed plugins whose package lies in ``folder`` (``a_b`` is trainer-a-b).

    Raises PluginError for a plugin of the folder that is not installed or cannot be used.
    """
    names = (path.parent.name.replace("_", "-") for path in folder.glob("*/pyproject.toml"))
    wanted = {f"trainer-{name}" for name in names}
    found = [entry for entry in Catalogue.installed().values() if entry.distribution in wanted]
    for entry in found:
        if entry.error:
            raise PluginError(f"the plugin '{entry.name}' cannot be used: {entry.error}")
    missing = sorted(wanted - {entry.distribution for entry in found})
    if missing:
        raise PluginError(
            f"{', '.join(missing)} of {folder} cannot be found among the installed plugins; "
            "run make install"
        )
    return Catalogue(found)


def pages(catalogue: Catalogue) -> dict[str, str]:
    """Return file name → text of every generated page."""
    return {
        "hooks.md": hooks_page(catalogue),
        "settings.md": settings_markdown(catalogue) + _pending(catalogue),
        "data-backend.md": backends_page(),
        "schema.json": json.dumps(json_schema(catalogue), indent=1, sort_keys=True) + "\n",
    }


def _pending(catalogue: Catalogue) -> str:
    """Return the section of keys and values that are refused because they are not built yet."""
    owners = pending_plugins()
    rows = [
        f"| `{name}` | {owners[name]} | {sentence} |"
        for name, sentence in sorted(pending_sentences().items())
        if not catalogue.owners(name) and not catalogue.providing(name)
    ]
    head = [
        "",
        "## Known, not built yet",
        "",
        "These keys, and these values of keys above, are refused with the sentence beside them. "
        "None is accepted and ignored.",
        "",
        "| key or value | belongs to | it |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"
