"""A tiny random teacher: ``python -m trainer_crepa.testing teacher DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def write_teacher(folder: str | Path, *, seed: int = 0, width: int = 24) -> Path:
    """Write a tiny random DINOv2 as transformers stores it and return its folder.

    Patches of 14 pixels, two layers; the same arguments give the same bits.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        layerscale_value=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = Dinov2Model(config)
    model.save_pretrained(folder)
    return Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer_crepa.testing")
    commands = parser.add_subparsers(dest="command", required=True)
    teacher = commands.add_parser("teacher", help="write a tiny random DINOv2")
    teacher.add_argument("folder", type=Path)
    teacher.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"{write_teacher(given.folder, seed=given.seed)}: a tiny random DINOv2")


if __name__ == "__main__":
    main()
