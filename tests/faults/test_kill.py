"""Killed at any moment and started again, a run ends with the bits of one that was never killed.

``python tests/faults/kill.py`` prints the same as a table.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trainer_core.testing.harness import attempt

NUM_KILLS, SEED = 20, 0


def load() -> ModuleType:
    """Return the script; tests are no package, so that it cannot be imported by name."""
    path = Path(__file__).with_name("kill.py")
    spec = importlib.util.spec_from_file_location("faults_kill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kill = load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def unharmed(folder: Path):
    return kill.unharmed(folder)


def test_what_is_compared_and_every_moment_is_there(unharmed):
    names = set(unharmed.left)
    last = "run/checkpoint-7"
    for name in ("tiny", "ema", "optimizer"):
        assert f"{last}/{name}.safetensors" in names
    assert {"run/tiny.safetensors", "run/ema/tiny.safetensors", "events"} <= names
    assert sum(name.endswith(".safetensors.zst") for name in names) > 8
    assert set(kill.MOMENTS) <= set(unharmed.passed)


def test_three_kills_in_one_run(folder: Path, unharmed):
    kills = [("cache entry", 3), ("accumulation", 5), ("checkpoint", 4)]
    assert kill.survives(folder, "three", kills, unharmed) == []


def test_a_second_sigterm_ends_the_run_at_once_and_harms_nothing(folder: Path, unharmed):
    twice = (signal.SIGTERM, signal.SIGTERM)
    process = kill.start(folder, "twice", ("accumulation", 5), twice)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "once more exits at once" in said
    checkpoints = [path.name for path in (folder / "twice" / "run").glob("checkpoint-*")]
    assert checkpoints == ["checkpoint-3"], "the step in work was left, not saved"
    assert "after step 3" in kill.finish(folder, "twice")
    assert kill.differences(kill.left(folder / "twice"), unharmed.left) == []


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(folder: Path, unharmed):
    first = kill.start(folder, "shared", ("accumulation", 4), (signal.SIGSTOP,))
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        keys = {**kill.SETTINGS, "cache_dir": str(folder / "shared" / "cache")}
        keys["output_dir"] = str(folder / "shared" / "run")
        second = attempt(folder, plugins={}, settings=keys, output="second", num_held_out=2)
        assert "another run is writing to" in str(second.error)
        assert "--output_dir" in str(second.error)
        assert second.draws == ()
    finally:
        first.send_signal(signal.SIGCONT)
    said, _ = first.communicate()
    assert first.returncode == 0, said
    assert kill.differences(kill.left(folder / "shared"), unharmed.left) == []


def test_killed_in_the_middle_with_three_techniques_at_work(tmp_path: Path):
    """TREAD, CREPA with its projector and teacher, scheduled sampling with its ramp."""
    for name in kill.TECHNIQUES:
        pytest.importorskip(f"trainer_{name}")
    testing = pytest.importorskip("trainer_crepa.testing")
    testing.write_teacher(tmp_path / "teacher")
    reference = kill.unharmed(tmp_path, tuple(kill.TECHNIQUES))
    last = "run/checkpoint-7"
    states = {f"{last}/plugins/{name}.safetensors" for name in ("crepa", "scheduled_sampling")}
    assert states | {f"{last}/plugin_parameters.safetensors"} <= set(reference.left)
    events = "\n".join(reference.left["events"])
    for mark in ("crepa/similarity", "scheduled_sampling/drift"):
        assert mark in events
    kills = [("accumulation", 5), ("checkpoint", 4)]
    assert kill.survives(tmp_path, "killed", kills, reference) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_every_kill_of_the_table(folder: Path, unharmed, number: int):
    drawn = kill.draw(NUM_KILLS, SEED, unharmed.passed)[number]
    assert kill.survives(folder, f"kill-{number}", [drawn], unharmed) == []
