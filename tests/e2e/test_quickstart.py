"""The quick start's own files, unchanged: what is not built yet is refused, the rest works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support import environment

from trainer_core.catalogue import Catalogue
from trainer_core.settings.owners import expected_owner
from trainer_core.testing.clips import write_clips

PAGE = Path(__file__).parents[1] / "data" / "quickstart"


def pending() -> set[str]:
    text = resources.files("trainer_core.settings").joinpath("pending.json").read_text()
    return set(json.loads(text))


def refused_of_the_page() -> set[str]:
    """The page's keys that pending.json holds, as keys or as key=value."""
    page = json.loads((PAGE / "config.json").read_text())
    return {k for k, v in page.items() if k in pending() or f"{k}={v}" in pending()}


def absent(keys: Iterable[str]) -> set[str]:
    """The keys that are built, and whose plugin is not here."""
    owners = {key: expected_owner(key) for key in set(keys) - refused_of_the_page()}
    return {key for key, owner in owners.items() if owner not in (None, *Catalogue.installed())}


def kept_of_the_page() -> dict[str, Any]:
    """The page's config without what is refused."""
    page = json.loads((PAGE / "config.json").read_text())
    refused = refused_of_the_page() | absent(page)
    return {key: value for key, value in page.items() if key not in refused}


@pytest.fixture(scope="module")
def folder(world: Path) -> Path:
    folder = world / "quickstart"
    shutil.copytree(PAGE, folder / "config" / "wan")
    data = folder / "datasets" / "disney-black-and-white"
    write_clips(data, n=2, sizes=[(832, 480)], frames=80, fps=16)
    return folder


def check(folder: Path, config: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("trainer")), "check", "--config", config, *words]
    for key in ("pretrained_model_name_or_path", "pretrained_t5_model_name_or_path"):
        command += [f"--{key}", "../model"]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def test_check_lists_exactly_the_pending_keys_and_nothing_else(folder: Path):
    done = check(folder, "config/wan/config.json")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("  ")]
    listed = {line.split(":")[1].split("=")[0].strip() for line in lines}
    elsewhere = absent(json.loads((PAGE / "config.json").read_text()))
    assert listed == refused_of_the_page() | elsewhere
    assert len(listed) == len(lines) > 5
    assert sum("not built yet" in line for line in lines) == len(refused_of_the_page())
    assert sum("which is not installed" in line for line in lines) == len(elsewhere)
    assert "Traceback" not in done.stderr + done.stdout


def test_with_those_keys_removed_it_passes(folder: Path):
    (folder / "config" / "kept.json").write_text(json.dumps(kept_of_the_page()))
    done = check(folder, "config/kept.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "75 -> 73" in done.stdout
    assert "rises during the whole run" in done.stdout
    assert not (folder / "datasets" / "disney-black-and-white" / "cache").exists()


@pytest.mark.parametrize("name", ["tread-simple", "tread-progressive"])
def test_pages_routes_are_refused_on_a_model_of_two_blocks(folder: Path, name: str):
    """Or because their plugin is not here; on 30 blocks they train, which its own tests show."""
    done = check(folder, f"config/wan/{name}.json", "--model_family", "wan")
    assert done.returncode == 2
    assert "tread_config" in done.stderr
    assert "2 blocks" in done.stderr or "not installed" in done.stderr


def test_the_pages_quantised_settings_pass(folder: Path):
    """Or the plugins that they need are not here."""
    quantised = {**kept_of_the_page(), **json.loads((PAGE / "quantised.json").read_text())}
    (folder / "config" / "quantised.json").write_text(json.dumps(quantised))
    done = check(folder, "config/quantised.json")
    if "no installed plugin provides this value" in done.stderr:
        assert "int8-quanto" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plugin quanto: base_model_precision is int8-quanto" in done.stdout
    assert "quantize_via has no effect" not in done.stdout
    assert "base_model_default_dtype has no effect" not in done.stdout


def test_the_pages_custom_fine_tune_is_taken_as_it_is(folder: Path, world: Path):
    """With its trailing comma, its subfolder "none", and folders in the place of repositories."""
    shutil.copytree(world / "model" / "transformer", folder / "path" / "to-the-other-model")
    words = ("--pretrained_vae_model_name_or_path", "../model")
    words += (
        "--data_backend_config",
        "config/wan/multidatabackend.json",
        "--train_batch_size",
        "2",
    )
    done = check(folder, "config/wan/custom-finetune.json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "path")
    (folder / "path" / "to-the-other-model").mkdir(parents=True)
    done = check(folder, "config/wan/custom-finetune.json", *words)
    assert done.returncode != 0
    assert "path/to-the-other-model holds no config.json" in done.stderr
