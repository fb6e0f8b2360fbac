"""A folder with two real clips, a tiny model and nothing else installed, for tests of what goes wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from trainer_core.cli.main import main
from trainer_core.testing.clips import write_clips

CONFIG: dict[str, Any] = {
    "model_family": "tiny",
    "model_type": "full",
    "tiny_layers": 1,
    "resolution": 32,
    "train_batch_size": 1,
    "max_train_steps": 2,
    "num_train_epochs": 0,
    "data_backend_config": "data.json",
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "log_step_interval": 1,
    "device": "cpu",
}
ENTRY: dict[str, Any] = {
    "id": "clips",
    "type": "local",
    "dataset_type": "video",
    "instance_data_dir": "clips",
    "video": {"num_frames": 5},
}
PLUGIN = """
from trainer_core import PluginInfo, PluginSettings, hookimpl, key

class Keys(PluginSettings):
    {keys}

class Plugin:
    info = PluginInfo({info})
    def __init__(self, settings): self.settings = settings
"""


@dataclass
class Installed:
    """What looks installed: the tiny model, and what a test adds."""

    site: Path

    def add(
        self, name: str, source: str | None = None, *, target: str = "", package: str = ""
    ) -> None:
        """Put a distribution with one plugin there; ``target`` instead of a source of its own."""
        package = package or f"faulty_{name.replace('-', '_')}"
        sys.modules.pop(package, None)  # of an earlier test
        info = self.site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        point = target or f"{package}:Plugin"
        (info / "entry_points.txt").write_text(f"[trainer.plugins]\n{name} = {point}\n")
        if source is not None:
            (self.site / f"{package}.py").write_text(source)

    def add_plugin(self, name: str, *, info: str = "", keys: str = "pass") -> None:
        """Put a plugin there that only declares."""
        self.add(name, PLUGIN.format(info=info, keys=keys))

    def entry_points(self, **wanted: str) -> metadata.EntryPoints:
        found = metadata.distributions(path=[str(self.site)])
        points = [point for each in found for point in each.entry_points]
        return metadata.EntryPoints(points).select(**wanted)


@dataclass
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """Its problems, one a line."""
        lines = self.err.strip().splitlines()
        return [
            line.strip().removeprefix("error: ") for line in lines if "problems in the" not in line
        ]


@dataclass
class Sandbox:
    """The folder, as the working directory."""

    root: Path
    installed: Installed
    capture: Any = field(repr=False)

    def write(
        self, changes: Mapping[str, Any] | None = None, entries: Any = None, **entry: Any
    ) -> None:
        """Write c.json and data.json; ``entry`` changes the only entry, None removes a key."""
        merged = {**CONFIG, **(changes or {})}
        Path("c.json").write_text(json.dumps(merged))
        made = {key: value for key, value in {**ENTRY, **entry}.items() if value is not None}
        Path("data.json").write_text(json.dumps([made] if entries is None else entries))

    def call(self, *words: str) -> Answer:
        """Run the command line in this process."""
        self.capture.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = self.capture.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    def check(self, *words: str) -> Answer:
        """Run ``trainer check``."""
        return self.call("check", "--config", "c.json", *words)

    def run(self, *words: str) -> Answer:
        """Run ``trainer run``."""
        return self.call("run", "--config", "c.json", *words)


def make_clips(folder: Path) -> Path:
    write_clips(folder / "clips", n=2, sizes=[(32, 32)], frames=9, fps=16)
    return folder / "clips"


def make(root: Path, site: Path, capture: Any, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Return the sandbox; the process looks as if nothing but the tiny model were installed."""
    import os

    for name in [name for name in os.environ if name.startswith("TRAINER_")]:
        monkeypatch.delenv(name)
    installed = Installed(site)
    installed.add("tiny", target="trainer_core.testing.tiny:Tiny", package="tiny_model")
    monkeypatch.setattr(metadata, "entry_points", installed.entry_points)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(root)
    return Sandbox(root, installed, capture)
