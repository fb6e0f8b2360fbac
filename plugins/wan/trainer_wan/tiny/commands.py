"""The commands of :mod:`trainer_wan.testing` that deal with the tiny Wan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

KNOWN = "known"


def add(commands: Any) -> None:
    """Add ``pretrain``, ``scenes``, ``score`` and ``judge``."""
    pretrain = _command(commands, "pretrain", "make the tiny Wan from nothing", _pretrain)
    pretrain.add_argument("folder", type=Path, help="where everything goes; the same one goes on")
    pretrain.add_argument("--preset", type=Path, default=Path("config/tiny"))
    scenes = _command(commands, "scenes", "write clips of a new shape with captions", _scenes)
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--shape", default="bar", help=f"a new one, or {KNOWN}: those it knows")
    scenes.add_argument("--n", type=int, default=12)
    scenes.add_argument("--seed", type=int, default=0)
    score = _command(commands, "score", "measure a checkpoint on the held-out captions", _score)
    score.add_argument("folder", type=Path)
    score.add_argument("--guidance", type=float, default=None)
    judge = _command(commands, "judge", "say and show what a LoRA has learned", _judge)
    judge.add_argument("output", type=Path, help="output folder of a finished run")
    judge.add_argument("--n", type=int, default=24, help="captions with the new word, and old ones")


def _command(
    commands: Any, name: str, about: str, call: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about)
    parser.set_defaults(call=call)
    return parser


def _pretrain(given: argparse.Namespace) -> None:
    from trainer_wan.tiny.pretrain import pretrain

    pretrain(given.folder, given.preset)


def _scenes(given: argparse.Namespace) -> None:
    from trainer_wan.tiny import scenes
    from trainer_wan.tiny.judge import concept_scenes

    known = given.shape == KNOWN
    wanted = scenes.split()[0][: given.n] if known else concept_scenes(given.shape, given.n)
    chosen = [scenes.varied(scene, given.seed + number) for number, scene in enumerate(wanted)]
    scenes.write_scenes(given.folder, chosen)
    print(f"{given.folder}: {len(chosen)} clips of {'shapes it knows' if known else given.shape}")


def _score(given: argparse.Namespace) -> None:
    from trainer_wan.tiny import render
    from trainer_wan.tiny.pretrain import score

    print(score(given.folder, guidance=given.guidance or render.GUIDANCE))


def _judge(given: argparse.Namespace) -> None:
    from trainer_wan.tiny.judge import judge

    judge(given.output, n=given.n)
