"""Images train as clips of one frame, alone and beside videos, with every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer_core.testing.clips import write_clips
from trainer_core.testing.harness import train
from trainer_wan import Wan

umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
clip = pytest.importorskip("trainer_clip")

PLUGINS = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "clip": clip.Clip}
KINDS = [
    "t2v-480p-1.3b-2.1",
    "i2v-14b-2.1",
    "flf2v-14b-2.1",
    "i2v-14b-2.2-both",
    "t2v-14b-2.2-high",
    "ti2v-5b-2.2",
]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_clips(root / "clips", n=2, sizes=[(32, 32)], frames=9, fps=16.0)
    (root / "stills").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32), (80 * index, 90, 40)).save(root / "stills" / f"{index}.png")
        (root / "stills" / f"{index}.txt").write_text("a plain colour")
    return root


def backends(folder: Path, kinds: tuple[str, ...]) -> str:
    entries: list[dict[str, Any]] = []
    for kind, place in (("video", "clips"), ("image", "stills")):
        if kind in kinds:
            entry = {"id": kind, "type": "local", "dataset_type": kind, "instance_data_dir": place}
            entries.append(entry | ({"video": {"num_frames": 5}} if kind == "video" else {}))
    for entry in entries:
        entry["instance_data_dir"] = str(folder / entry["instance_data_dir"])
    file = folder / f"{'-'.join(kinds)}.json"
    file.write_text(json.dumps(entries))
    return str(file)


@pytest.mark.parametrize("kinds", [("image",), ("video", "image")], ids="+".join)
@pytest.mark.parametrize("name", KINDS)
def test_images_alone_and_beside_videos(folder, checkpoints, name, kinds):
    keys = {"wan_first_frame_probability": 0.5} if name.startswith("ti2v") else {}
    done = train(
        folder,
        plugins=PLUGINS,
        named=["wan", "lora"],
        settings={
            "model_flavour": name,
            "pretrained_model_name_or_path": str(checkpoints(name)),
            "data_backend_config": backends(folder, kinds),
            "model_type": "lora",
            "train_batch_size": 1,
            "max_train_steps": STEPS,
            "checkpoint_step_interval": 0,
            **keys,
        },
        output=f"{name}-{'-'.join(kinds)}",
    )
    trained = {sample.partition("/")[0] for draw in done.draws for sample in draw.samples}
    assert trained == set(kinds)
    losses = [event["loss"] for event in done.steps]
    assert len(set(losses)) == STEPS
    said = any("clips of one frame" in line for line in done.said)
    assert said == name.startswith(("i2v", "flf2v"))
