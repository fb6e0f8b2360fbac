"""The quick start's own snippets for image-to-video, and runs with the network cut off."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import environment, tool

from trainer_core.testing.clips import write_clips

PAGE = Path(__file__).parents[1] / "data" / "quickstart"
KEYS = {
    "max_train_steps": 2,
    "mixed_precision": "no",
    "train_batch_size": 1,
    "resolution": 32,
    "lora_rank": 2,
    "checkpoint_step_interval": 0,
    "validation_prompt": "a cat",
    "validation_step_interval": 2,
    "validation_resolution": "32x32",
    "validation_num_video_frames": 5,
    "validation_num_inference_steps": 2,
    "disable_benchmark": True,
}
CUT_OFF = ["unshare", "--net", "--map-root-user"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("trainer_wan", "trainer_umt5", "trainer_lora", "trainer_clip"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("i2v")
    write_clips(
        folder / "datasets" / "disney-black-and-white", n=2, sizes=[(32, 32)], frames=9, fps=16
    )
    for name, flavour in (("model-2.1", "i2v-14b-2.1"), ("model-2.2", "i2v-14b-2.2-high")):
        words = ("checkpoint", name, "--layers", "1", "--flavour", flavour)
        tool("trainer_wan.testing", *words, cwd=folder)
    return folder


def page_entries() -> list[dict[str, Any]]:
    """The page's data file, with what its snippets add to the video entry and beside it."""
    media, text = json.loads((PAGE / "multidatabackend.json").read_text())
    media |= json.loads((PAGE / "video-with-conditioning.fragment.txt").read_text())
    embeds = json.loads((PAGE / "conditioning-backend.fragment.txt").read_text())
    return [media, text, embeds]


def write_config(folder: Path, entries: list[dict[str, Any]], name: str, **keys: Any) -> None:
    entries = json.loads(json.dumps(entries))
    for entry in entries:
        if entry["dataset_type"] == "video":  # the page's sizes would train for hours here
            sizes = (
                "resolution",
                "minimum_image_size",
                "maximum_image_size",
                "target_downsample_size",
            )
            entry |= dict.fromkeys(sizes, 32)
            entry["video"] |= {"num_frames": 9, "min_frames": 9}
    (folder / f"{name}-data.json").write_text(json.dumps(entries))
    config = {**KEYS, "model_family": "wan", "data_backend_config": f"{name}-data.json", **keys}
    (folder / f"{name}.json").write_text(json.dumps({**config, "output_dir": f"output-{name}"}))


def run(folder: Path, name: str, *words: str, before: list[str] | None = None) -> str:
    trainer = str(Path(sys.executable).with_name("trainer"))
    command = [*(before or []), trainer, "run", "--config", f"{name}.json", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def entries_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.safetensors*") if path.is_file()]


def test_wan_2_1_with_the_pages_snippets(folder: Path):
    """The dataset's own folder wins over that of the entry it names, as the page says."""
    write_config(folder, page_entries(), "first", pretrained_model_name_or_path="model-2.1")
    said = run(folder, "first", "--model_flavour", "i2v-14b-2.1")
    assert "plugin clip: model_flavour is i2v-14b-2.1" in said
    assert "cache of clip.vision: 0 reused, 2 encoded" in said
    kept = folder / "cache" / "conditioning_image_embeds"
    assert len(entries_below(kept / "disney-black-and-white")) == 2
    assert not (kept / "disney-conditioning").exists()
    again = run(folder, "first", "--model_flavour", "i2v-14b-2.1", "--output_dir", "again")
    assert "cache of clip.vision: 2 reused, 0 encoded" in again


def test_datasets_share_an_entry_for_image_embeddings(folder: Path):
    media, text, embeds = page_entries()
    del media["cache_dir_conditioning_image_embeds"]
    copy = folder / "datasets" / "copy"
    shutil.copytree(folder / "datasets" / "disney-black-and-white", copy)
    second = {**media, "id": "copy", "instance_data_dir": "datasets/copy"}
    write_config(
        folder, [media, second, text, embeds], "shared", pretrained_model_name_or_path="model-2.1"
    )
    said = run(folder, "shared", "--model_flavour", "i2v-14b-2.1")
    kept = folder / "cache" / "conditioning_image_embeds" / "disney-conditioning"
    assert len(entries_below(kept)) == 2, "the same frames are encoded once"
    assert "cache of clip.vision: 0 reused, 2 encoded" in said


@pytest.mark.parametrize("stage", ["high", "low"])
def test_wan_2_2_with_the_pages_flags(folder: Path, stage: str):
    """The page's snippets stay as they are: this model has no CLIP, which is said."""
    write_config(
        folder, page_entries(), f"second-{stage}", pretrained_model_name_or_path="model-2.2"
    )
    words = ("--model_flavour", f"i2v-14b-2.2-{stage}", "--wan_validation_load_other_stage")
    said = run(folder, f"second-{stage}", *words)
    ranges = {"high": "t in [900, 1000]", "low": "t in [0, 900]"}
    assert f"{stage}-noise expert, {ranges[stage]}" in said
    assert "conditioning_image_embeds has no effect: i2v-14b-2.2" in said
    assert "clip" not in [
        line.split()[1].rstrip(":") for line in said.splitlines() if "plugin " in line
    ]
    samples = folder / f"output-second-{stage}" / "validation" / "step-00000002"
    assert (samples / "validation.mp4").is_file()


def test_an_entry_that_is_not_there_is_named(folder: Path):
    entries = page_entries()[:2]
    keys = {"model_flavour": "i2v-14b-2.1", "pretrained_model_name_or_path": "model-2.1"}
    write_config(folder, entries, "missing", **keys)
    trainer = str(Path(sys.executable).with_name("trainer"))
    done = subprocess.run(
        [trainer, "check", "--config", "missing.json"], cwd=folder, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "conditioning_image_embeds = 'disney-conditioning': names no enabled entry" in done.stderr
    )


def can_cut_off() -> bool:
    try:
        return subprocess.run([*CUT_OFF, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_cut_off(), reason="this machine grants no network namespace")
def test_with_the_network_cut_off_local_paths_train(folder: Path):
    """Not offline by a switch alone: in a namespace without any network device that is up."""
    probe = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    down = subprocess.run(
        [*CUT_OFF, sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert "Network is unreachable" in down.stderr, "the loopback is down too"
    write_config(folder, page_entries(), "offline", pretrained_model_name_or_path="model-2.1")
    words = ("--model_flavour", "i2v-14b-2.1", "--cache_dir", "cache-offline")
    said = run(folder, "offline", *words, before=CUT_OFF)
    assert "Done: 2 steps." in said
    assert (folder / "output-offline" / "pytorch_lora_weights.safetensors").is_file()
