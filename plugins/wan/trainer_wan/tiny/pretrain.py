"""Makes the tiny Wan from nothing: clips, VAE, transformer. Every part goes on where it was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.settings.files import read_json
from trainer_wan.tiny import scenes

if TYPE_CHECKING:
    from torch import Tensor

VAE_EACH, VAE_BLOBS = 3, 232
TRAIN_EACH = 12
PRESET_FOLDER = "output/tiny-wan"
UNSEEN_SEED = 1000
"""Variations from this number on are in no training set."""


def read_clips(paths: Sequence[Path]) -> list[Tensor]:
    """Return the clips (17, 3, 64, 64) uint8 of mp4 files."""
    import torch

    from trainer_core.media import read_frames

    return [torch.from_numpy(read_frames(p)).permute(0, 3, 1, 2).contiguous() for p in paths]


def vae_scenes() -> list[scenes.Scene]:
    """Return what the VAE sees: captions to train on, and irregular outlines."""
    train, _ = scenes.split()
    return scenes.many(train, VAE_EACH) + scenes.many(scenes.blobs(VAE_BLOBS), 1)


def unseen_scenes(each: int = 1) -> list[scenes.Scene]:
    """Return variations of the held-out captions."""
    _, held_out = scenes.split()
    return scenes.many(held_out, each, seed=UNSEEN_SEED)


def make_vae(folder: Path) -> None:
    """Train the VAE in ``folder`` and write it to ``folder/vae``."""
    from trainer_core.progress import Display
    from trainer_wan.tiny import vae_training

    display, total = Display(), sum(stage.steps for stage in vae_training.STAGES)
    clips = read_clips(scenes.write_scenes(folder / "clips" / "vae", vae_scenes()))
    state = folder / "vae_state.safetensors"
    begun = vae_training.steps_done(state)
    with display.task("VAE", total, start=begun, every=50) as advance:

        def told(step: int, loss: float) -> None:
            advance(1, f"loss {loss:.3f}")

        vae = vae_training.train(clips, state, told=told)
    unseen = read_clips(scenes.write_scenes(folder / "clips" / "unseen", unseen_scenes()))
    display.say(f"VAE: {vae_training.psnr(vae, unseen):.2f} dB on {len(unseen)} unseen clips")
    vae.save_pretrained(folder / "vae.writing")
    (folder / "vae.writing").rename(folder / "vae")


def make_untrained(folder: Path) -> None:
    """Write ``folder/untrained``: the trained VAE and everything else as it begins."""
    from diffusers import AutoencoderKLWan

    from trainer_wan.tiny import parts

    vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True)
    parts.pipeline(vae, parts.new_transformer()).save_pretrained(folder / "untrained.writing")
    (folder / "untrained.writing").rename(folder / "untrained")


def placed(value: Any, folder: Path) -> Any:
    """Return a preset with the folder in the place of the one that it names."""
    if isinstance(value, str) and Path(value).is_relative_to(PRESET_FOLDER):
        return str(folder / Path(value).relative_to(PRESET_FOLDER))
    if isinstance(value, dict):
        return {name: placed(item, folder) for name, item in value.items()}
    return [placed(item, folder) for item in value] if isinstance(value, list) else value


def train_transformer(folder: Path, preset: Path) -> None:
    """Train the transformer with ``trainer run`` and the preset; it resumes by itself."""
    train, _ = scenes.split()
    scenes.write_scenes(folder / "clips" / "train", scenes.many(train, TRAIN_EACH))
    scenes.write_scenes(folder / "clips" / "unseen", unseen_scenes())
    config = placed(read_json(preset / "config.json"), folder)
    config["data_backend_config"] = str(folder / "multidatabackend.json")
    for name, value in (
        ("config", config),
        ("multidatabackend", placed(read_json(preset / "multidatabackend.json"), folder)),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "trainer_core", "run", "--plugins", "wan"]
    subprocess.run([*command, "--config", str(folder / "config.json")], check=True)


def finish(folder: Path) -> Path:
    """Write ``folder/tiny-wan``: the averaged weights in bfloat16, as they are shipped."""
    import torch
    from diffusers import WanPipeline

    averaged = folder / "run" / "ema" / "pipeline"
    pipeline = WanPipeline.from_pretrained(averaged, use_safetensors=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.to(torch.bfloat16)
    shipped = folder / "tiny-wan"
    pipeline.save_pretrained(shipped)
    for path in shipped.rglob("*.json"):  # the libraries note where a part was loaded from
        content = json.loads(path.read_text("utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return shipped


def score(checkpoint: Path, *, guidance: float) -> str:
    """Return the figures of a checkpoint in two lines: its VAE's, and those of what it draws."""
    from diffusers import AutoencoderKLWan, WanPipeline

    from trainer_core.progress import Display
    from trainer_wan.tiny import measure, render, vae_training

    _, held_out = scenes.split()
    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", use_safetensors=True)
    with tempfile.TemporaryDirectory() as work:
        paths = scenes.write_scenes(Path(work), unseen_scenes())
        decibels = vae_training.psnr(vae, read_clips(paths))
    pipeline = WanPipeline.from_pretrained(checkpoint, use_safetensors=True)
    with Display().task("render", len(held_out), every=12) as advance:
        captions = [scene.caption for scene in held_out]
        clips = render.render(pipeline, captions, guidance=guidance, done=advance)
    return (
        f"VAE: {decibels:.2f} dB on {len(paths)} unseen clips\n"
        f"{measure.score(clips, held_out)} on {len(held_out)} unseen captions, "
        f"{render.STEPS} steps, guidance {guidance:g}"
    )


def pretrain(folder: Path, preset: Path) -> None:
    """Make the tiny Wan in ``folder``; what is done already is not done again."""
    from trainer_wan.tiny import render

    if not (folder / "vae").exists():
        make_vae(folder)
    if not (folder / "untrained").exists():
        make_untrained(folder)
    train_transformer(folder, preset)
    print(score(finish(folder), guidance=render.GUIDANCE))
