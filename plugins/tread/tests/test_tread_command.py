"""The quick start's own examples through the real command, on a checkpoint of 30 tiny blocks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import BACKENDS, CONFIG, environment, tool

PAGE = Path(__file__).parents[3] / "tests" / "data" / "quickstart"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("trainer_wan", "trainer_umt5", "trainer_lora"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("tread")
    tool("trainer_core.testing", "clips", "clips", "--n", "2", cwd=folder)
    tool("trainer_wan.testing", "checkpoint", "8", "--layers", "8", cwd=folder)
    (folder / "backends.json").write_text(json.dumps(BACKENDS[:1]))
    for name in ("simple", "progressive"):
        shutil.copy(PAGE / f"tread-{name}.json", folder)
    return folder


@pytest.fixture(scope="module")
def deep(world: Path) -> Path:
    """The same world, with the checkpoint of 30 blocks."""
    tool("trainer_wan.testing", "checkpoint", "30", "--layers", "30", cwd=world)
    return world


def trainer(world: Path, word: str, name: str, *words: str, layers: int = 30):
    """Run the page's file as it is; what it does not say comes from the command line."""
    keys = {
        **CONFIG,
        "data_backend_config": "backends.json",
        "pretrained_model_name_or_path": layers,
        "output_dir": f"output-{name}-{layers}",
        "max_train_steps": 3,
        "use_ema": False,
        "gradient_checkpointing": True,
    }
    command = [str(Path(sys.executable).with_name("trainer")), word]
    command += ["--config", f"tread-{name}.json", *words]
    for key, value in keys.items():
        command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return subprocess.run(
        command, cwd=world, env=environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("simple", "tread keeps 90 % of the tokens in blocks 2 to 28 of 30; 1."),
        (
            "progressive",
            "tread keeps 90 % of the tokens in blocks 2 to 8, 75 % in blocks 9 to 11, 65 % in "
            "blocks 12 to 15, 75 % in blocks 16 to 23, 90 % in blocks 24 to 28 of 30; 1.",
        ),
    ],
)
def test_the_pages_examples_train_and_say_what_they_do(deep: Path, name: str, line: str):
    done = trainer(deep, "run", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plugin tread: tread_config is set" in done.stdout
    assert line in done.stdout
    tokens = re.search(r"x by the FLOP model at (\d+) tokens \(the largest clip\)", done.stdout)
    assert tokens is not None
    assert int(tokens[1]) % 3 == 0, "9 frames are 3 of latents"
    events = (deep / f"output-{name}-30" / "events.jsonl").read_text().splitlines()
    losses = [e["loss"] for e in map(json.loads, events) if e["kind"] == "step"]
    assert len(losses) == 3


@pytest.mark.parametrize("word", ["check", pytest.param("run", marks=pytest.mark.slow)])
def test_with_fewer_blocks_the_error_names_their_number_and_the_route(world: Path, word: str):
    done = trainer(world, word, "progressive", layers=8)
    assert done.returncode == 2
    text = done.stderr
    assert "tread-progressive.json: tread_config: routes[0] (blocks 2 to 8)" in text
    assert "which has 8 blocks, 0 to 7" in text
    assert "Traceback" not in done.stdout + text
    assert not (world / "output-progressive-8").exists()


@pytest.mark.slow
def test_a_plugin_list_without_tread_leaves_the_example_idle(world: Path):
    done = trainer(world, "check", "progressive", "--plugins", "wan", layers=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tread_config has no effect: tread is not in --plugins" in done.stdout
