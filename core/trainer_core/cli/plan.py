"""The command ``plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer_core.cli.run import prepare, settings_command

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.settings.load import Resolved


@settings_command("plan")
@click.option("--clip", metavar="FxHxW", help="Frames, height, width; no data is looked at then.")
@click.option("--vram", type=float, metavar="GIB", help="Say whether it fits, and what would help.")
@click.option(
    "--tflops", type=float, metavar="RATE", help="Speed of the card; measured without it."
)
@click.option("--json", "to", type=click.Path(path_type=Path), metavar="FILE", help="Write it too.")
@click.option("--probe", "with_probe", is_flag=True, help="Run three real steps and compare.")
def plan(config: Path | None, plugins: str | None, keys: tuple[str, ...], **options: Any) -> int:
    """Predict memory in each phase, time and tokens of a step, and space on the disk.

    Nothing is downloaded or loaded: the run's own code goes over networks without contents.
    """

    def with_values(values: Mapping[str, Any]) -> tuple[Resolved, Host]:
        return prepare(config, plugins, keys, values)

    from trainer_core.planner import command

    return command.plan(with_values, **options)
