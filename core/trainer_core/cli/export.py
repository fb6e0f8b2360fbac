"""``trainer export``: a run's adapter as other programs read it."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    "export",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", required=True, metavar="NAME",
    help="Program that is to read it: diffusers or comfyui.",
)  # fmt: skip
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path),
    help="File to write. [default: RUN/export/NAME-FORMAT.safetensors, one for each expert]",
)  # fmt: skip
@click.option(
    "--role", "--expert", "role", metavar="ROLE",
    help="Only this expert, such as transformer or transformer_2.",
)  # fmt: skip
@click.option("--ema", is_flag=True, help="The averaged weights instead of the live ones.")
@click.argument("keys", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
def export(
    run: Path,
    format_: str,
    output: Path | None,
    role: str | None,
    ema: bool,
    keys: tuple[str, ...],
) -> int:
    """Write the adapter of a run, or of one of its checkpoints, as other programs read it.

    RUN is the output folder of a run, or a checkpoint in it. The run's model is loaded (on the CPU unless
    --device says otherwise), each file is read back another way than it was written, and every layer's
    change is compared with the model's before the file gets its name. Further keys replace those of the
    run, such as --pretrained_model_name_or_path for a model that was moved.
    """
    from trainer_core.catalogue import Catalogue
    from trainer_core.exporting import Wanted, export, settings_of

    catalogue = Catalogue.installed()
    resolved = settings_of(run, args=keys, catalogue=catalogue)

    from trainer_core.plugins import build

    host = build(resolved, catalogue=catalogue)
    wanted = Wanted(run, format_, output=output, role=role, ema=ema)
    export(resolved, host, wanted, say=click.echo)
    return 0
