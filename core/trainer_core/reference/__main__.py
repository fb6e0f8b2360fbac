"""``python -m trainer_core.reference docs/reference`` writes the generated pages anew."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--plugins",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("plugins"),
    show_default=True,
    help="Folder of the plugins that the pages tell of; others are left out.",
)
def main(folder: Path, plugins: Path) -> None:
    """Write the reference pages into FOLDER."""
    from trainer_core.errors import TrainerError
    from trainer_core.reference.pages import first_party, pages

    try:
        written = pages(first_party(plugins))
    except TrainerError as error:
        raise click.ClickException(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
        click.echo(str(folder / name))


if __name__ == "__main__":
    main(prog_name="python -m trainer_core.reference")
