"""The real command on a tiny real checkpoint and real mp4 files, made once for all tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import BACKENDS, CONFIG, Command, environment, tool


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a checkpoint and config files; runs write below it."""
    pytest.importorskip("trainer_wan")
    pytest.importorskip("trainer_umt5")
    pytest.importorskip("trainer_lora")
    folder = tmp_path_factory.mktemp("world")
    tool("trainer_core.testing", "clips", "clips", "--n", "6", cwd=folder)
    tool("trainer_core.testing", "clips", "held-out", "--n", "2", "--seed", "1", cwd=folder)
    tool("trainer_wan.testing", "checkpoint", "model", "--layers", "2", cwd=folder)
    (folder / "backends.json").write_text(json.dumps(BACKENDS))
    config = {**CONFIG, "data_backend_config": "backends.json"}
    config["pretrained_model_name_or_path"] = "model"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def trainer(module_trainer: Command) -> Command:
    """The same, for tests that start runs of their own."""
    return module_trainer


@pytest.fixture(scope="session")
def module_trainer(world: Path) -> Command:
    """Run ``trainer WORD --config config.json ...`` in the world's folder."""

    def call(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("trainer")), *words]
        if words[0] in ("run", "check", "plan", "data"):
            command += ["--config", "config.json"]
        done = subprocess.run(
            command, cwd=world, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    return call
