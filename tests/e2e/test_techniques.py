"""The quick start's settings of TREAD, CREPA and rollout together, through the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import BACKENDS, CONFIG, environment, tool

NAMES = ("wan", "tread", "crepa", "scheduled_sampling")
SETTINGS = {
    **CONFIG,
    "data_backend_config": "backends.json",
    "max_train_steps": 3,
    "gradient_checkpointing": True,
    "tread_config": {
        "routes": [{"selection_ratio": 0.1, "start_layer_idx": 2, "end_layer_idx": -2}]
    },
    "crepa_enabled": True,
    "crepa_block_index": 8,
    "crepa_weight": 0.5,
    "crepa_adjacent_distance": 1,
    "crepa_temporal_decay": 1.0,
    "crepa_encoder": "teacher",
    "crepa_encoder_image_size": 224,
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 0.5,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in (*NAMES, "umt5", "lora"):
        pytest.importorskip(f"trainer_{name}")
    folder = tmp_path_factory.mktemp("techniques")
    tool("trainer_core.testing", "clips", "clips", "--n", "2", cwd=folder)
    tool("trainer_crepa.testing", "teacher", "teacher", cwd=folder)
    for layers in ("4", "30"):
        tool("trainer_wan.testing", "checkpoint", layers, "--layers", layers, cwd=folder)
    (folder / "backends.json").write_text(json.dumps(BACKENDS[:1]))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


def trainer(world: Path, word: str, layers: int) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("trainer")), word, "--config", "config.json"]
    command += ["--plugins", ",".join(NAMES), "--pretrained_model_name_or_path", str(layers)]
    return subprocess.run(
        command, cwd=world, env=environment(), capture_output=True, text=True, check=False
    )


def test_all_three_run_on_thirty_blocks_and_say_what_they_do(world: Path):
    done = trainer(world, "run", 30)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "crepa aligns block 8 of 30 with teacher" in said
    assert "tread keeps 90 % of the tokens in blocks 2 to 28 of 30" in said
    assert "scheduled_sampling rolls 50% of the samples out over 1 to 2 of 30" in said
    table = said[said.index("What each plugin cost") :]
    assert all(f"  {name}" in table for name in NAMES[1:])


def test_with_fewer_blocks_the_model_s_number_and_the_key_are_named(world: Path):
    done = trainer(world, "check", 4)
    assert done.returncode == 2
    assert "crepa_block_index = 8: is not in the model, which has 4 blocks, 0 to 3" in done.stderr
    assert "Traceback" not in done.stderr
