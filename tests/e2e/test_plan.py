"""``trainer plan`` and ``memory_policy: auto`` by the real command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import Command

QUICK = ("--tflops", "0.1", "--output_dir", "planned")


@pytest.fixture(scope="module")
def said(world: Path, module_trainer: Command) -> str:
    words = ("plan", "--plugins", "wan", *QUICK, "--vram", "24", "--json", "plan.json", "--probe")
    return module_trainer(*words).stdout


def test_it_tells_phases_time_cache_and_whether_it_fits(world: Path, said: str):
    told = json.loads((world / "plan.json").read_text())
    names = [phase["name"] for phase in told["phases"]]
    assert names == ["encoding with wan.vae", "encoding with umt5.text", "training"]
    for name in names:
        assert re.search(rf"[\d.]+ GiB  {name}: ", said)
    assert told["operations_per_step"] > 0
    assert told["cache_bytes"]["wan.vae"] > 0
    assert "Fits 24 GiB" in said
    assert told["unknown"] == []


def test_the_probe_trains_three_steps_compares_and_leaves_nothing(world: Path, said: str):
    assert re.search(
        r"Probe of 3 steps: memory .* GiB above the .* GiB at the start, foretold", said
    )
    assert "step 3/3" in said
    assert not (world / "planned" / "plan-probe").exists()


def test_a_card_that_is_too_small_gets_remedies_of_plugins_that_were_not_named(
    world: Path, module_trainer: Command
):
    words = ("plan", "--plugins", "wan,lora", *QUICK, "--vram", "0.75", "--clip", "9x64x64")
    more = ("--gradient_checkpointing", "false", "--train_batch_size", "64")
    done = module_trainer(*words, *more)
    assert "Does not fit 0.75 GiB" in done.stdout
    ladder = done.stdout.partition("cheapest first")[2]
    assert "gradient_checkpointing_policy" in ladder
    assert "9 frames of 64x64" in done.stdout


@pytest.mark.parametrize("clip", ["81", "8x64x64", "9x60x64", "0x64x64", "9x0x0"])
def test_a_clip_that_the_model_does_not_take_is_refused(module_trainer: Command, clip: str):
    done = module_trainer("plan", "--plugins", "wan", *QUICK, "--clip", clip, code=2)
    assert "--clip" in done.stderr
    assert "81x480x832" in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_takes_the_fastest_way_that_fits_and_says_why(world: Path, module_trainer: Command):
    words = ("run", "--plugins", "wan", "--output_dir", "auto", "--max_train_steps", "1")
    done = module_trainer(*words, "--memory_policy", "auto", "--gradient_checkpointing", "true")
    assert re.search(
        r"memory_policy auto: gradient_checkpointing false \(nothing is computed twice\); training "
        r"needs [\d.]+ of [\d.]+ GiB",
        done.stdout,
    )
    settings = json.loads((world / "auto" / "settings.json").read_text())["settings"]
    assert settings["gradient_checkpointing"] is False
