"""``trainer plugins list``: what is installed, and what each plugin brings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from trainer_core.catalogue import Catalogue


@click.group()
def plugins() -> None:
    """Show the installed plugins."""


@plugins.command("list")
def show() -> int:
    """List every installed plugin: version, hooks, keys, what it provides and requires."""
    from rich.console import Console

    from trainer_core.catalogue import Catalogue

    catalogue = Catalogue.installed()
    if not catalogue:
        click.echo("No plugin is installed. Install one: pip install -e plugins/NAME")
        return 0
    table = _table(catalogue)
    console = Console(file=sys.stdout)
    if not console.is_terminal:  # nothing is wrapped in a file or a pipe
        console.width = console.measure(table, options=console.options.update(width=9999)).maximum
    console.print(table)
    for entry in catalogue.broken():
        click.echo(f"{entry.name} cannot be used: {entry.error}")
    return 0


def _table(catalogue: Catalogue) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("name", "version", "hooks", "keys", "provides", "requires", "summary"):
        table.add_column(title, overflow="fold")
    for entry in catalogue.values():
        info = entry.info
        requires = [need if isinstance(need, str) else need.__name__ for need in info.requires]
        table.add_row(
            _lines([entry.name]),
            _lines([entry.version]),
            _lines(entry.hooks),
            _lines(entry.keys),
            _lines((*info.provides, *info.values)),
            _lines(requires),
            _lines(["cannot be used" if entry.error else info.summary]),
        )
    return table


def _lines(words: Sequence[str]) -> Text:
    from rich.text import Text  # plain text: nothing in a plugin's names is markup

    return Text("\n".join(words) or "-")
