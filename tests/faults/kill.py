"""Kills a tiny training with SIGKILL again and again, and compares its end with an unharmed run.

``python tests/faults/kill.py --kills 20 --seed 0`` prints a table: moment, kills, equal. A kill either
comes from outside at a random time, or from inside, at the n-th passage of a named moment; a file that is
being written is cut in half first, as if the rest had never reached the disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

SETTINGS: dict[str, Any] = {
    "max_train_steps": 7,
    "gradient_accumulation_steps": 2,
    "caption_dropout_probability": 0.2,
    "checkpoint_step_interval": 3,
    "checkpoints_total_limit": 1,
    "use_ema": True,
    "validation_prompt": "a red circle moves left",
    "validation_step_interval": 2,
    "eval_steps_interval": 2,
    "eval_timesteps": 2,
    "tiny_layers": 2,
    "compress_disk_cache": True,
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "tread": {
        "tread_config": {
            "routes": [{"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 0}]
        }
    },
    "crepa": {
        "crepa_block_index": 0,
        "crepa_encoder_image_size": 64,
        "crepa_scheduler": "cosine",
        "crepa_similarity_threshold": 0.9,
    },
    "scheduled_sampling": {
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
        "scheduled_sampling_ramp_steps": 4,
        "scheduled_sampling_sampler": "unipc",
    },
}
MOMENTS = {
    "probing": "a header was read, its row is not yet in the index",
    "encoding": "an encoder is at work",
    "cache entry": "an entry is half written",
    "accumulation": "the second micro-batch of a step",
    "update": "the weights moved, their average did not",
    "checkpoint": "a file of a checkpoint is half written",
    "renaming": "all files of a checkpoint are there, its name is not",
    "pruning": "an old checkpoint is half deleted",
    "validation": "a sample is half written",
    "final save": "the final weights are half written",
}
RANDOM = "any time"
Kill = tuple[str, float]
"""(moment, number of the passage from 1), or (RANDOM, share of the duration of an unharmed run)."""


# --- the training, which kills itself ---------------------------------------------------------------


@dataclass
class Fate:
    """Counts passages of each moment, and sends itself signals at one of them."""

    at: str = ""
    number: int = 0
    signals: Sequence[signal.Signals] = (signal.SIGKILL,)
    passed: Counter[str] = field(default_factory=Counter)

    def passes(self, moment: str, file: int | None = None) -> None:
        """Count a passage; at the chosen one cut the open file in half and let the signals come."""
        self.passed[moment] += 1
        if (moment, self.passed[moment]) == (self.at, self.number):
            if file is not None:
                os.truncate(f"/proc/self/fd/{file}", os.fstat(file).st_size // 2)
            for number in self.signals:
                signal.raise_signal(number)

    def before(self, owner: Any, name: str, moment: str, when: Callable[..., bool] | None = None):
        """Let a call of ``owner.name`` pass the moment first."""
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if when is None or when(*arguments, **named):
                self.passes(moment)
            return real(*arguments, **named)

        setattr(owner, name, call)


def moment_of(path: str) -> str | None:
    """Return the moment in which a file with this path is forced to the disk."""
    if not path.endswith(".tmp"):
        return None
    for part, moment in (("/cache/", "cache entry"), ("/.checkpoint-", "checkpoint")):
        if part in path:
            return moment
    if "/validation/" in path:
        return "validation"
    return "final save" if ".safetensors" in path else None


def arm(fate: Fate) -> None:
    """Put the fate into the places where a run can die."""
    from trainer_core import checkpoint, loop, session
    from trainer_core.data.store import Store
    from trainer_core.ema import Ema

    force, delete = os.fsync, shutil.rmtree

    def fsync(file: int) -> None:
        if moment := moment_of(os.readlink(f"/proc/self/fd/{file}")):
            fate.passes(moment, file)
        force(file)

    def rmtree(path: Any, *arguments: Any, **named: Any) -> None:
        if str(path).endswith(".deleted"):
            if (fate.at, fate.number) == ("pruning", fate.passed["pruning"] + 1):
                next(item for item in Path(path).iterdir() if item.is_file()).unlink()
            fate.passes("pruning")
        delete(path, *arguments, **named)

    os.fsync, shutil.rmtree = fsync, rmtree
    fate.before(Store, "remember_probe", "probing")
    fate.before(session.Encoding, "encode_batch", "encoding")
    second = lambda host, run, batch, output: batch.moment.micro == 1  # noqa: E731
    fate.before(loop, "loss_terms", "accumulation", second)
    fate.before(Ema, "update", "update")
    fate.before(checkpoint, "replace_folder", "renaming")


def techniques(folder: Path, names: Sequence[str]) -> tuple[dict[str, type], dict[str, Any]]:
    """Return name → class of installed plugins, and the settings that make them act."""
    from importlib.metadata import entry_points

    found = {point.name: point.load() for point in entry_points(group="trainer.plugins")}
    settings: dict[str, Any] = {}
    for name in names:
        settings |= TECHNIQUES[name]
    if "crepa" in names:
        settings["crepa_encoder"] = str(folder / "teacher")
    return {name: found[name] for name in names}, settings


def train_here(folder: Path, output: str, fate: Fate, names: Sequence[str] = ()) -> None:
    """Train in this process; clips lie below ``folder``, all else below ``folder/output``.

    names: plugins that take part, see :data:`TECHNIQUES`.
    """
    import torch

    from trainer_core.testing.harness import train

    torch.set_num_threads(1)
    arm(fate)
    plugins, more = techniques(folder, names)
    settings = {**SETTINGS, **more, "cache_dir": str(folder / output / "cache")}
    settings["output_dir"] = str(folder / output / "run")
    done = train(folder, plugins=plugins, settings=settings, output=output, num_held_out=2)
    print("\n".join(done.said))


# --- the one who looks on ---------------------------------------------------------------------------


def start(
    folder: Path,
    output: str,
    kill: Kill = ("", 0),
    signals: Sequence[signal.Signals] = (signal.SIGKILL,),
    plugins: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start the training in a process of its own, with its fate."""
    moment, number = kill if kill[0] in MOMENTS else ("", 0)
    names = ",".join(each.name for each in signals)
    words = [
        sys.executable,
        __file__,
        "--child",
        str(folder),
        output,
        moment,
        str(int(number)),
        names,
        ",".join(plugins),
    ]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@dataclass(frozen=True)
class Unharmed:
    """A run that nobody killed. passed: how often it passed each moment. plugins: that took part."""

    left: dict[str, bytes | list[str]]
    passed: dict[str, int]
    seconds: float
    plugins: tuple[str, ...] = ()


def unharmed(folder: Path, plugins: Sequence[str] = ()) -> Unharmed:
    """Write clips, train to the end, and return what the run left."""
    from trainer_core.testing.harness import write_world

    write_world(folder, num_clips=4, num_held_out=2)
    begin = time.monotonic()
    said = finish(folder, "unharmed", plugins)
    passed = json.loads(said.splitlines()[-1])
    return Unharmed(left(folder / "unharmed"), passed, time.monotonic() - begin, tuple(plugins))


def finish(folder: Path, output: str, plugins: Sequence[str] = ()) -> str:
    """Train to the end; return the output."""
    process = start(folder, output, plugins=plugins)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{said}")
    return said


def die(folder: Path, output: str, kill: Kill, *, reference: Unharmed) -> bool:
    """Start the training and let it be killed; tell whether it was (it may have ended before)."""
    process = start(folder, output, kill, plugins=reference.plugins)
    if kill[0] == RANDOM:
        try:
            process.wait(timeout=kill[1] * reference.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    said, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with {process.returncode}:\n{said}")
    return process.returncode == -signal.SIGKILL


def left(folder: Path) -> dict[str, bytes | list[str]]:
    """Return what must be equal: weights, optimiser, average, samples, events without times, cache.

    Entries of the cache by path; its index holds times of files and is left out.
    """
    kept = re.compile(r"(safetensors(\.zst)?|mp4|png)$|optimizer\.json$")
    found: dict[str, bytes | list[str]] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and kept.search(path.name)
    }
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    found["events"] = [line for line in lines if json.loads(line)["kind"] != "timing"]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs or is on one side only."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def survives(folder: Path, output: str, kills: Sequence[Kill], reference: Unharmed) -> list[str]:
    """Kill a run at each of ``kills`` in turn, let it end, and return what differs (nothing, we hope)."""
    num_killed = sum(die(folder, output, kill, reference=reference) for kill in kills)
    finish(folder, output, reference.plugins)
    wrong = differences(left(folder / output), reference.left)
    named = sum(kill[0] != RANDOM for kill in kills)
    return wrong if num_killed >= named else [*wrong, "(a moment was not reached)"]


def draw(kills: int, seed: int, passed: dict[str, int]) -> list[Kill]:
    """Return so many kills: the moments in turn, then one at any time, and so on."""
    chance, names = random.Random(seed), [*MOMENTS, RANDOM]
    drawn: list[Kill] = []
    for number in range(kills):
        name = names[number % len(names)]
        at = chance.uniform(0.3, 1) if name == RANDOM else chance.randint(1, passed[name])
        drawn.append((name, at))
    return drawn


@click.command()
@click.option("--kills", default=20, show_default=True, help="So many runs are killed once each.")
@click.option("--seed", default=0, show_default=True, help="Decides where.")
@click.option("--child", nargs=6, hidden=True)
def main(kills: int, seed: int, child: tuple[str, str, str, str, str, str] | None) -> None:
    """Kill, restart, compare; exit with 1 if anything differs."""
    if child is not None:
        folder, output, moment, number, names, plugins = child
        fate = Fate(moment, int(number), [signal.Signals[name] for name in names.split(",")])
        train_here(Path(folder), output, fate, plugins.split(",") if plugins else ())
        print(json.dumps(fate.passed))
        return
    with tempfile.TemporaryDirectory() as folder:
        reference = unharmed(Path(folder))
        num_files = len(reference.left) - 1
        print(f"{num_files} files and {len(reference.left['events'])} events are compared")
        print(f"{'moment':14} {'passage':>10}  equal")
        bad = 0
        for number, kill in enumerate(draw(kills, seed, reference.passed)):
            wrong = survives(Path(folder), f"killed-{number}", [kill], reference)
            name, at = kill
            where = f"{at:.0%}" if name == RANDOM else f"{at} of {reference.passed[name]}"
            print(f"{name:14} {where:>10}  {'yes' if not wrong else ', '.join(wrong)}", flush=True)
            bad += bool(wrong)
        print(f"{kills} kills, {kills - bad} runs equal bit for bit")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
