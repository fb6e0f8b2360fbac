"""What the end-to-end tests share: a small config, and how a run is compared with another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CONFIG = {
    "model_family": "wan",
    "mixed_precision": "no",
    "resolution": 32,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "max_train_steps": 8,
    "num_train_epochs": 0,
    "checkpoint_step_interval": 3,
    "use_ema": True,
    "seed": 7,
    "log_step_interval": 1,
}
BACKENDS = [
    {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": "clips",
        "caption_strategy": "textfile",
        "repeats": 3,
        "video": {"num_frames": 9, "frame_selection": "random"},
    },
    {
        "id": "held-out",
        "type": "local",
        "dataset_type": "eval",
        "instance_data_dir": "held-out",
        "caption_strategy": "textfile",
        "video": {"num_frames": 9},
    },
]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRAINER_")}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def tool(*words: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=environment(), check=True)


Command = Callable[..., subprocess.CompletedProcess[str]]


def comparable(folder: Path) -> dict[str, bytes | list[str]]:
    """Return what a run must reproduce bit for bit: weights, states, and events without times."""
    found: dict[str, bytes | list[str]] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    found["events"] = [
        line
        for line in (folder / "events.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] != "timing"
    ]
    return found
