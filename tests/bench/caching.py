"""Measures whether encoding is all that one waits for: ``python tests/bench/caching.py FOLDER``.

Clips of the demo through the tiny Wan's VAE, torch on one thread. Alone: the clips lie decoded in memory
and are encoded one after another. Cached: the trainer's own cache stage reads, decodes, resizes, encodes
and writes them. The share is what of the throughput alone is left; both take turns. Writes
caching.json."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trainer_core import session
from trainer_core.catalogue import Catalogue
from trainer_core.flow import Flow
from trainer_core.media import read_frames
from trainer_core.optim import Optimizers
from trainer_core.plugins import build
from trainer_core.progress import Display
from trainer_core.settings.load import resolve
from trainer_wan import vae
from trainer_wan.tiny import judge, scenes

NUM_CLIPS, ROUNDS = 48, 5


def write_data(folder: Path) -> Path:
    """Write the clips and the file that names them."""
    clips, file = folder / "clips", folder / "data.json"
    scenes.write_scenes(clips, scenes.many(scenes.split()[0], 1)[:NUM_CLIPS])
    backend = {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": str(clips),
        "caption_strategy": "textfile",
        "resolution": scenes.SIZE,
        "video": {"num_frames": scenes.FRAMES},
    }
    file.write_text(json.dumps([backend]))
    return file


def alone(folder: Path) -> float:
    """Return the seconds of encoding alone."""
    frames = [read_frames(path) for path in sorted((folder / "clips").glob("*.mp4"))]
    clips = [torch.from_numpy(f).permute(0, 3, 1, 2).contiguous() for f in frames]
    network = vae.load(judge.CHECKPOINT / "vae", device=torch.device("cpu"))
    vae.encode(network, clips[:1])
    began = time.perf_counter()
    for clip in clips:
        vae.encode(network, [clip])
    return time.perf_counter() - began


def cached(folder: Path, data: Path) -> float:
    """Return the seconds from the first clip that is asked for to the last one that is written."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    config = {
        "pretrained_model_name_or_path": str(judge.CHECKPOINT), "model_type": "lora",
        "mixed_precision": "no", "device": "cpu", "train_batch_size": 1, "plugins": ["wan", "lora"],
        "data_backend_config": str(data), "output_dir": str(folder / "out"), "cache_dir": str(cache),
    }  # fmt: skip
    catalogue = Catalogue.installed()
    resolved = resolve(config, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    begun = session.prepare(resolved, host, display=Display.silent())
    marks: list[float] = []
    for encoder in session.collect_encoders(begun.run, host):
        if encoder.name == "wan.vae":
            load = encoder.load

            def timed(load: Any = load) -> Any:
                network = load()
                marks.append(time.perf_counter())  # what follows is the stage itself
                return network

            object.__setattr__(encoder, "load", timed)
            encoders = [encoder]
    from trainer_core.data import fill_cache

    fill_cache(
        begun.plan, begun.run, encoders, session.Encoding(host, begun.run),
        captions=[""], progress=begun.display.task,
    )  # fmt: skip
    return time.perf_counter() - marks[0]


def main() -> None:
    """Let both take turns and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data, rows = write_data(given.folder), []
    for _ in range(ROUNDS):
        row = {"alone_s": alone(given.folder), "cached_s": cached(given.folder, data)}
        rows.append({**row, "share": row["alone_s"] / row["cached_s"]})
        print(
            f"alone {row['alone_s']:.2f} s, cached {row['cached_s']:.2f} s: {rows[-1]['share']:.0%}"
        )
    share = statistics.median(row["share"] for row in rows)
    print(f"{NUM_CLIPS} clips: {share:.0%} of the throughput of encoding alone (median)")
    result = {"clips": NUM_CLIPS, "median_share": share, "rounds": rows}
    (given.folder / "caching.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
