"""The commands that work on a run's settings: ``run``, ``check`` and ``data``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.settings.load import Resolved

_WORDS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


class SettingsCommand(click.Command):
    """A command whose further options are the keys of core and of the installed plugins."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the command's options, then every key by group."""
        super().format_options(ctx, formatter)
        from trainer_core.catalogue import Catalogue
        from trainer_core.settings.explain import groups

        formatter.write_paragraph()
        formatter.write_text(
            "Every key can be given as --key value, stand in the config file, or come from the "
            "environment as TRAINER_KEY."
        )
        for group in groups(Catalogue.installed()):
            with formatter.section(group.title):
                formatter.write_dl(
                    [(f"--{row.name}", _about(row.about, row.default)) for row in group.rows]
                )


def _about(about: str, default: str) -> str:
    return f"{about} [{default}]" if default == "required" else f"{about} [default: {default}]"


def settings_command(name: str) -> Callable[[Callable[..., int]], click.Command]:
    """Return a decorator that makes a command with --config, --plugins and any key."""

    def decorate(function: Callable[..., int]) -> click.Command:
        function = click.argument(
            "keys", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]..."
        )(function)
        function = click.option(
            "--plugins", metavar="A,B", help="Plugins of the run; without it the keys decide."
        )(function)
        function = click.option(
            "--config", metavar="FILE", type=click.Path(path_type=Path),
            help="Config file. [default: config/config.json]",
        )(function)  # fmt: skip
        return click.command(name, cls=SettingsCommand, context_settings=_WORDS)(function)

    return decorate


@settings_command("run")
def run(config: Path | None, plugins: str | None, keys: tuple[str, ...]) -> int:
    """Train. A run that was interrupted goes on from its newest checkpoint."""
    resolved, host = prepare(config, plugins, keys)
    from trainer_core import session

    if resolved.core.memory_policy == "auto":
        from trainer_core.planner.auto import settle

        chosen, sentence = settle(lambda values: prepare(config, plugins, keys, values))
        click.echo(sentence)
        resolved, host = prepare(config, plugins, keys, chosen)
    return session.run(resolved, host)


@settings_command("check")
def check(config: Path | None, plugins: str | None, keys: tuple[str, ...]) -> int:
    """Do everything up to the first step that needs no accelerator, and say what would happen."""
    resolved, host = prepare(config, plugins, keys)
    from trainer_core import session

    return session.check(resolved, host)


@settings_command("data")
def data(config: Path | None, plugins: str | None, keys: tuple[str, ...]) -> int:
    """Show every file: its bucket, the kept span, frames and tokens, or why it is left out."""
    resolved, host = prepare(config, plugins, keys)
    from trainer_core import session

    return session.data(resolved, host)


def prepare(
    config: Path | None,
    plugins: str | None,
    keys: tuple[str, ...],
    values: Mapping[str, object] | None = None,
) -> tuple[Resolved, Host]:
    """Resolve the settings, then build the plugins; nothing heavy is imported for wrong ones.

    values: keys that outrank all others; plugins that own them join those that were named.
    """
    from trainer_core.catalogue import Catalogue
    from trainer_core.settings.load import resolve

    named = [] if plugins is None else [f"--plugins={plugins}"]
    catalogue = Catalogue.installed()
    resolved = resolve(config, args=(*keys, *named), catalogue=catalogue)
    if values:
        if (chosen := resolved.core.plugins) is not None:
            owners = [entry.name for key in values for entry in catalogue.owners(key)]
            named = [f"--plugins={','.join(dict.fromkeys((*chosen, *owners)))}"]
        resolved = resolve(config, args=(*keys, *words(values), *named), catalogue=catalogue)

    from trainer_core.flow import Flow
    from trainer_core.optim import Optimizers
    from trainer_core.plugins import build

    return resolved, build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))


def words(values: Mapping[str, object]) -> list[str]:
    """Return keys and values as they stand on the command line."""
    told = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}
    return [word for key, value in told.items() for word in (f"--{key}", value)]
