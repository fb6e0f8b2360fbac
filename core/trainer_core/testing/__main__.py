"""``python -m trainer_core.testing clips DIR [--n 8]`` writes real clips with captions."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def main() -> None:
    """Material for tests and first steps."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--n", default=8, show_default=True, help="Number of clips.")
@click.option("--seed", default=0, show_default=True, help="What is drawn depends on it.")
@click.option("--frames", type=int, help="Frames of every clip; they vary without it.")
@click.option("--fps", type=float, help="Frame rate of every clip; it varies without it.")
def clips(folder: Path, n: int, seed: int, frames: int | None, fps: float | None) -> None:
    """Write real H.264 clips of moving shapes, with captions."""
    from trainer_core.testing.clips import write_clips

    write_clips(folder, n=n, seed=seed, frames=frames, fps=fps)
    click.echo(f"{n} clips with captions in {folder}")


if __name__ == "__main__":
    main(prog_name="python -m trainer_core.testing")
