"""The entry point: subcommands by name, errors as sentences, exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from trainer_core.heap import give_back_large_blocks
from trainer_core.noise import quiet_libraries

COMMANDS = {
    "run": ("trainer_core.cli.run", "run", "Train."),
    "check": ("trainer_core.cli.run", "check", "Check a run up to its first step; train nothing."),
    "plan": ("trainer_core.cli.plan", "plan", "Predict memory and time, before any download."),
    "data": ("trainer_core.cli.run", "data", "Show what becomes of every file of the data."),
    "export": ("trainer_core.cli.export", "export", "Write a run's adapter for other programs."),
    "plugins": ("trainer_core.cli.plugins", "plugins", "Show the installed plugins."),
}  # fmt: skip
"""Command → module, its attribute, one line of help. The module is imported when it is called."""


class LazyGroup(click.Group):
    """A group whose subcommands are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand, None for an unknown one."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in COMMANDS.items()])


def _version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib import metadata

        click.echo(f"trainer {metadata.version('trainer-core')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version and exit.",
)  # fmt: skip
def group() -> None:
    """Fine-tune video diffusion models, with plugins for models, techniques and trackers."""


def main(words: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for wrong input, 1 for an error, 130 for Ctrl-C."""
    quiet_libraries()
    give_back_large_blocks()
    try:
        code = group.main(args=words, prog_name="trainer", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe went away; say nothing
        sys.exit(1)
    except Exception as error:
        sys.exit(report(error))
    sys.exit(code if isinstance(code, int) else 0)


def report(error: Exception) -> int:
    """Show an error, ours as sentences, any other with its traceback; return the exit code."""
    from trainer_core.errors import ConfigError, TrainerError

    if not isinstance(error, TrainerError):
        import traceback

        traceback.print_exception(error)
        if sys.version_info < (3, 11):  # later versions print the notes of an error themselves
            click.echo("\n".join(getattr(error, "__notes__", ())), err=True)
        return 1
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        click.echo(f"{len(error.problems)} problems in the settings:", err=True)
        for problem in error.problems:
            _say(f"  {problem}")
    else:
        _say(f"error: {error}")
    for line in getattr(error, "__notes__", ()):
        _say(line)
    return error.exit_code


def _say(line: str) -> None:
    """Write to stderr, whatever a key or a path holds; passwords in addresses are left out."""
    from trainer_core.errors import redacted

    click.echo(redacted(line).encode("utf-8", "backslashreplace").decode(), err=True)
