"""Compares ``trainer plan`` with what a process takes: ``python tests/bench/plan.py FOLDER``.

Models of a few blocks of the shape of Wan 1.3B, random, LoRA on q, k, v, out, float32 on the CPU. Each
case is a process of its own: it rehearses the run, then trains three real steps, and compares the growth
of the process with the largest phase that was foretold. Writes plan.json."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_core.heap import give_back_large_blocks

FRAMES, HEIGHT, WIDTH = 65, 256, 240
CASES: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "4 blocks, nothing twice": (4, {"gradient_checkpointing": False}),
    "4 blocks, full": (4, {}),
    "8 blocks, keep_attention": (8, {"gradient_checkpointing_policy": "keep_attention"}),
}
SETTINGS = {
    "model_type": "lora",
    "lora_rank": 16,
    "mixed_precision": "no",
    "device": "cpu",
    "train_batch_size": 1,
    "learning_rate": 1e-4,
    "gradient_checkpointing": True,
    "plugins": ["wan", "lora"],
}


def write_model(folder: Path, blocks: int) -> Path:
    """Write a random model with blocks of the shape of Wan 1.3B and small other parts."""
    import torch
    from diffusers import WanTransformer3DModel

    from trainer_wan.testing import TEXT_DIM, write_checkpoint

    target = folder / f"model-{blocks}"
    if not (target / "done").exists():
        write_checkpoint(target, layers=1)
        torch.manual_seed(0)
        WanTransformer3DModel(
            num_layers=blocks, num_attention_heads=12, ffn_dim=8960, text_dim=TEXT_DIM
        ).save_pretrained(target / "transformer")
        (target / "done").touch()
    return target


def write_data(folder: Path) -> Path:
    """Write one clip and the file that names it."""
    from trainer_core.testing.clips import write_clips

    clips, file = folder / "clips", folder / "data.json"
    write_clips(clips, n=1, seed=0, sizes=[(WIDTH, HEIGHT)], frames=FRAMES, fps=16.0)
    backend = {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": str(clips),
        "caption_strategy": "textfile",
        "resolution": 248,
        "video": {"num_frames": FRAMES},
    }
    file.write_text(json.dumps([backend]))
    return file


def compare(folder: Path, name: str) -> dict[str, Any]:
    """Rehearse, train, and return both figures; in a process that has done nothing else."""
    from trainer_core import session
    from trainer_core.catalogue import Catalogue
    from trainer_core.flow import Flow
    from trainer_core.optim import Optimizers
    from trainer_core.planner.probe import probe
    from trainer_core.planner.rehearse import forecast
    from trainer_core.plugins import build
    from trainer_core.progress import Display
    from trainer_core.settings.load import resolve

    blocks, more = CASES[name]
    given = {
        **SETTINGS,
        **more,
        "pretrained_model_name_or_path": str(write_model(folder, blocks)),
        "data_backend_config": str(write_data(folder)),
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }
    catalogue = Catalogue.installed()

    def prepare(values: Mapping[str, Any]) -> Any:
        resolved = resolve({**given, **values}, environ={}, catalogue=catalogue)
        return resolved, build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))

    resolved, host = prepare({})
    begun = session.prepare(resolved, host, display=Display.silent())
    found = forecast(begun.run, host)
    measured = probe(prepare, begun.run.output_dir, begun.run.device)
    return {
        "case": name,
        "tokens": found.tokens,
        "foretold_bytes": found.peak.num_bytes,
        "grown_bytes": measured.grown,
        "base_bytes": measured.base,
        "error": found.peak.num_bytes / measured.grown - 1,
        "operations": found.operations,
        "seconds": measured.seconds,
    }


def main() -> None:
    """Run every case in a process of its own, print a line for each, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=list(CASES), help="one case, in this process")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.case is not None:
        give_back_large_blocks()  # as the command does
        print("RESULT", json.dumps(compare(given.folder.resolve(), given.case)))
        return
    rows = []
    for name, (blocks, _) in CASES.items():
        write_model(given.folder.resolve(), blocks)
        command = [sys.executable, __file__, str(given.folder), "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        (line,) = (text for text in done.stdout.splitlines() if text.startswith("RESULT "))
        rows.append(json.loads(line.removeprefix("RESULT ")))
        row = rows[-1]
        print(
            f"{name}: {row['tokens']} tokens, foretold {row['foretold_bytes'] / 2**30:.2f} GiB, grown "
            f"{row['grown_bytes'] / 2**30:.2f} GiB ({row['error']:+.1%}), {row['seconds']:.1f} s a step"
        )
    result = {"machine": platform.processor() or platform.machine(), "rows": rows}
    (given.folder / "plan.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
