"""Killed at any moment and started again, a run ends with the bits of one that was never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import Command, comparable, environment


def start(world: Path, output: str, *words: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("trainer")), "run", "--config", "config.json"]
    command += ["--output_dir", output, *words]
    return subprocess.Popen(
        command, cwd=world, env=environment(), stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def stop_after(process: subprocess.Popen[str], step: int, number: signal.Signals) -> int:
    """Send a signal as soon as the run shows a step; return the exit code."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    else:
        pytest.fail("the run ended early:\n" + "".join(lines))
    process.stdout.read()
    return process.wait()


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> dict[str, bytes | list[str]]:
    process = start(world, "through")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return comparable(world / "through")


def test_killed_three_times_in_the_middle_of_steps(world: Path, uninterrupted):
    for step in (2, 4, 7):
        code = stop_after(start(world, "killed"), step, signal.SIGKILL)
        assert code == -signal.SIGKILL
    process = start(world, "killed")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "Going on from killed/checkpoint-6" in output
    assert comparable(world / "killed") == uninterrupted


def test_sigterm_finishes_the_step_saves_and_goes_on_bit_for_bit(world: Path, uninterrupted):
    process = start(world, "stopped")
    assert stop_after(process, 4, signal.SIGTERM) == 128 + signal.SIGTERM
    checkpoints = sorted(p.name for p in (world / "stopped").glob("checkpoint-*"))
    assert len(checkpoints) == 2, "the interval's and the signal's"
    process = start(world, "stopped")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    again = comparable(world / "stopped")
    final = "pytorch_lora_weights.safetensors"
    assert again[final] == uninterrupted[final]
    assert again[f"ema/{final}"] == uninterrupted[f"ema/{final}"]
    assert steps_of(again) == steps_of(uninterrupted)


def steps_of(found: dict[str, bytes | list[str]]) -> list[str]:
    return [line for line in found["events"] if json.loads(line)["kind"] == "step"]


def test_a_finished_run_started_again_changes_nothing(world: Path, trainer: Command, uninterrupted):
    done = trainer("run", "--output_dir", "through")
    assert "after step 8" in done.stdout
    assert comparable(world / "through") == uninterrupted


def test_the_runs_losses_are_not_all_alike(uninterrupted):
    losses = [json.loads(line)["loss"] for line in steps_of(uninterrupted)]
    assert len(set(losses)) == len(losses) == 8


def test_other_settings_are_refused_with_both_ways_out(trainer: Command, uninterrupted):
    done = trainer("run", "--output_dir", "through", "--lora_rank", "8", code=2)
    assert "lora_rank: 4 in the checkpoint, 8 now" in done.stderr
    assert "--output_dir" in done.stderr
    assert "--resume_from_checkpoint none" in done.stderr
    longer = trainer("run", "--output_dir", "through", "--max_train_steps", "9")
    assert "after step 8" in longer.stdout
