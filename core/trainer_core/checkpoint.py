"""Checkpoints: a folder that is either whole or absent, and whose every byte is checked at load.

Written beside its final name, forced to the disk, renamed. ``manifest.json`` holds the size and digest
of every file, and of itself. Tensors are safetensors, all else JSON: no pickle is ever loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer_core.errors import CheckpointError, ConfigError, ModelError, Problem
from trainer_core.files import (
    digest_file,
    digest_json,
    read_tensors,
    remove_folder,
    replace_folder,
    sync,
    write_json,
    write_tensors,
)

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
FORMAT = 1
ANOTHER = (
    "Resume from another checkpoint with --resume_from_checkpoint FOLDER, or start afresh with "
    "--resume_from_checkpoint none."
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose bytes were checked. ``state``: what :func:`write` was given."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files, or none if it has no such file."""
        path = self.folder / name
        try:
            return read_tensors(path) if path.exists() else {}
        except ModelError as error:
            raise CheckpointError(f"{error}. {ANOTHER}") from error

    def json(self, name: str) -> Any:
        """Return the value of one of its JSON files."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read ({error}). {ANOTHER}"
            ) from error


def write(
    output_dir: Path, *, step: int, state: Mapping[str, Any], fill: Callable[[Path], None]
) -> Path:
    """Write ``checkpoint-<step>``: ``fill`` writes files into the folder it gets. Returns the folder."""
    final = output_dir / f"checkpoint-{step}"
    work = output_dir / f".checkpoint-{step}.writing"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    try:
        fill(work)
        write_json(work / "state.json", {"step": step, **state})
        _write_manifest(work)
        replace_folder(work, final)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint-{step} could not be written below {output_dir}: {error.strerror}; "
            "earlier checkpoints are untouched. Make room or make the folder writable, then start "
            "the same command again."
        ) from error
    return final


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "blake2b": digest_file(path)}
    body = {"format": FORMAT, "files": files}
    write_json(folder / MANIFEST, {**body, "digest": digest_json(body)})
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync(path)


def read(folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder`` after checking every byte; CheckpointError says what is off."""
    damage = inspect(folder)
    if damage:
        raise CheckpointError(f"{folder} is damaged: {damage}. {ANOTHER}")
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(folder=folder, step=int(state["step"]), state=state)


def inspect(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if all of its bytes are as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        body = {"format": manifest["format"], "files": manifest["files"]}
        if digest_json(body) != manifest["digest"]:
            return f"{MANIFEST} was changed"
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if digest_file(path) != entry["blake2b"]:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def steps(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints below ``output_dir``, oldest first."""
    if not output_dir.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def find(output_dir: Path, resume: str, *, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that ``resume_from_checkpoint`` means, or None to start afresh.

    "latest" passes over damaged checkpoints, saying so; if all are damaged it is an error.
    """
    if resume == "none":
        return None
    if resume != "latest":
        folder = Path(resume) if Path(resume).is_dir() else output_dir / resume
        if not folder.is_dir():
            way_out = 'Name a checkpoint folder, or write "latest" or "none".'
            raise ConfigError(
                [Problem("resume_from_checkpoint", "no such folder.", resume, way_out=way_out)]
            )
        return read(folder)
    newest_first = [output_dir / f"checkpoint-{step}" for step in reversed(steps(output_dir))]
    for folder in newest_first:
        damage = inspect(folder)
        if damage is None:
            return read(folder)
        say(f"{folder.name} is damaged ({damage}); looking at the one before it.")
    if newest_first:
        read(newest_first[0])
    return None


def prune(output_dir: Path, *, keep: int, spare: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints (0 keeps all) and what a crash left half-done.

    spare: a step whose checkpoint stays, whatever its age.
    """
    for rest in output_dir.glob(".checkpoint-*"):
        if rest.suffix in (".writing", ".deleted"):
            shutil.rmtree(rest, ignore_errors=True)
    for step in steps(output_dir)[:-keep] if keep else []:
        if step != spare:
            remove_folder(output_dir / f"checkpoint-{step}")


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Write an optimiser's state: tensors as safetensors, the rest as JSON."""
    # torch's own form, whatever a subclass wraps around it: it is written back entry by entry
    state = torch.optim.Optimizer.state_dict(optimizer)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                shared = value.numel() and value.data_ptr() in seen  # such as one table for all
                seen.add(value.data_ptr())
                tensors[f"{index}/{name}"] = value.clone() if shared else value
            else:
                plain.setdefault(str(index), {})[name] = value
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(state["param_groups"]):
        groups.append({})
        for name, value in group.items():
            if isinstance(value, Tensor):  # torch-optimi keeps step counters here
                tensors[f"group{index}/{name}"] = value
            elif name != "params":
                groups[index][name] = value
    write_tensors(folder / "optimizer.safetensors", tensors)
    shapes = {name: list(value.shape) for name, value in sorted(tensors.items())}
    plain_values = {"state": plain, "param_groups": groups, "tensors": shapes}
    write_json(folder / "optimizer.json", plain_values)


def load_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Restore what :func:`save_optimizer` wrote, without casting: bit for bit."""
    plain = checkpoint.json("optimizer.json")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = checkpoint.tensors("optimizer.safetensors")
    # a missing or reshaped moment would be trained with, without an error
    found = {name: list(value.shape) for name, value in tensors.items()}
    if found != plain.get("tensors", found):
        raise CheckpointError(
            f"{checkpoint.folder / 'optimizer.safetensors'} does not hold the tensors that "
            f"optimizer.json lists. {ANOTHER}"
        )
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        if index.startswith("group"):
            group = optimizer.param_groups[int(index.removeprefix("group"))]
            before = group.get(key)
            group[key] = value.to(before.device) if isinstance(before, Tensor) else value
            continue
        parameter = parameters[int(index)]
        # a step counter stays where the optimiser made it; state lies beside its parameter
        device = "cpu" if value.dim() == 0 else parameter.device
        optimizer.state[parameter][key] = value.to(device)
    for index, entry in plain["state"].items():
        optimizer.state[parameters[int(index)]].update(entry)
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def save_plugin(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a plugin's ``state_dict()``: tensors and JSON-able values."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    write_tensors(folder / "plugins" / f"{name}.safetensors", tensors)
    write_json(folder / "plugins" / f"{name}.json", plain)


def load_plugin(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return what :func:`save_plugin` wrote; CheckpointError if it wrote nothing for this plugin."""
    if not (checkpoint.folder / "plugins" / f"{name}.json").is_file():
        raise CheckpointError(
            f"{checkpoint.folder} holds no state of plugin {name!r}, which had none in the version that "
            "wrote it. Go on with that version of the plugin, or give this run another --output_dir, "
            "or start afresh here with --resume_from_checkpoint none."
        )
    return {
        **checkpoint.json(f"plugins/{name}.json"),
        **checkpoint.tensors(f"plugins/{name}.safetensors"),
    }


def check_same_run(
    checkpoint: Checkpoint, *, settings: Mapping[str, Any], plugins: Mapping[str, str], data: str
) -> None:
    """Refuse to resume with other plugins, training settings or data than the checkpoint's.

    ``settings``: the keys that a resume may not change. ``plugins``: name → version.
    """
    was = checkpoint.state
    lines = [
        f"  {name}: {was['settings'].get(name)!r} in the checkpoint, {settings.get(name)!r} now"
        for name in sorted({*was["settings"], *settings})
        if was["settings"].get(name) != settings.get(name)
    ]
    gone = sorted(set(was["plugins"]) - set(plugins))
    new = sorted(set(plugins) - set(was["plugins"]))
    lines += [f"  plugin {name}: in the checkpoint, not in this run" for name in gone]
    lines += [f"  plugin {name}: in this run, not in the checkpoint" for name in new]
    if was["data"] != data:
        lines.append("  data: other files, captions or clip plans than when it was written")
    if lines:
        raise CheckpointError(
            f"{checkpoint.folder} belongs to a run that differs from this one:\n"
            + "\n".join(lines)
            + "\nMake them equal again, or give this run another --output_dir, or start afresh here "
            "with --resume_from_checkpoint none."
        )
