"""The installed command, as a user calls it, with plugins that lie on the path as distributions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(sys.executable).with_name("trainer")
HEAVY = ("torch", "diffusers", "transformers", "av")


@pytest.fixture
def trainer(tmp_path):
    """Run ``trainer`` in an empty folder, with ``tmp_path/site`` on the import path."""

    def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("TRAINER_")}
        path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [str(TRAINER), *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**clean, "PYTHONPATH": path, "COLUMNS": "80", **variables},
        )

    return call


@pytest.fixture
def install(tmp_path):
    """Put a distribution with one plugin on the path."""

    def call(name: str, source: str, *, distribution: str = "", version: str = "1.5") -> None:
        package = distribution or f"{name}_package"
        site = tmp_path / "site"
        info = site / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[trainer.plugins]\n{name} = {package}:Plugin\n")
        (site / f"{package}.py").write_text(source)

    return call


TOY = """
from trainer_core import PluginInfo, PluginSettings, hookimpl, key

class Keys(PluginSettings):
    toy_size: int = key(3, "Size of the toy.", ge=1)

class Plugin:
    info = PluginInfo(summary="A toy [bold]model", settings=Keys, provides=("model", "adapter"),
                      values=("model_family=toy", "lora_type=toy"))

    def __init__(self, settings):
        self.settings = settings
        {body}

    @hookimpl
    def describe_model(self, run):
        return None
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plugins", "list"], ["run", "-h"]])
def test_quick_answers_import_nothing_heavy(words, tmp_path):
    script = (
        "import sys; from trainer_core.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_lists_the_commands_and_the_keys_of_core_and_plugins(trainer, install):
    install("toy", TOY.format(body="pass"))
    done = trainer("--help")
    assert done.returncode == 0
    for name in ("run", "check", "data", "plugins"):
        assert f"\n  {name} " in done.stdout
    text = trainer("run", "--help").stdout
    assert "--learning_rate" in text
    assert "--toy_size" in text
    assert "Size of the toy. [default: 3]" in text


def test_the_list_shows_each_plugin_and_what_is_wrong_with_broken_ones(trainer, install):
    install("toy", TOY.format(body="pass"))
    install("broken", "import not_there_at_all")
    install("twice", "", distribution="first")
    install("twice", "", distribution="second")
    done = trainer("plugins", "list")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("toy "))
    assert "1.5" in row
    assert "describe_model" in row
    assert "toy_size" in row
    assert "A toy [bold]model" in row
    assert "broken cannot be used: its import failed: ModuleNotFoundError" in done.stdout
    assert "both bring a plugin of this name" in done.stdout


def test_wrong_input_exits_2_with_every_problem_and_no_traceback(trainer, install, tmp_path):
    install("toy", TOY.format(body="pass"))
    install("broken", "import not_there_at_all")
    (tmp_path / "c.json").write_text(json.dumps({"seed": "x", "toy_size": 0, "tread": 1}))
    done = trainer("run", "--config", "c.json", "--plugins", "toy,broken", "--lr_end", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("5 problems in the settings:")
    for part in (
        "c.json: seed = 'x'",
        "c.json: toy_size = 0: must be a whole number, at least 1.",
        "c.json: tread = 1: unknown key",
        "the plugin 'broken' cannot be used: its import failed",
        "command line: lr_end = '-1'",
    ):
        assert part in done.stderr


def test_without_a_config_file_the_way_out_is_told(trainer):
    done = trainer("check")
    assert done.returncode == 2
    assert "--config FILE" in done.stderr
    assert trainer("tran").returncode == 2


def test_a_failure_in_a_plugin_shows_its_traceback_and_who_it_was(trainer, install, tmp_path):
    install("toy", TOY.format(body="raise ValueError('toy is broken')"))
    (tmp_path / "c.json").write_text("{}")
    done = trainer("run", "--config", "c.json", "--plugins", "toy")
    assert done.returncode == 1
    assert "ValueError: toy is broken" in done.stderr
    assert "raised while the plugin 'toy' was built" in done.stderr


def test_an_interrupt_exits_130(trainer, install, tmp_path):
    install("toy", TOY.format(body="raise KeyboardInterrupt"))
    (tmp_path / "c.json").write_text("{}")
    done = trainer("data", TRAINER_EXTRA_ARGS="--config c.json --plugins toy")
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
