"""Says what a LoRA on the tiny Wan has learned, and shows it: scores before and after, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.progress import Display
from trainer_core.testing.clips import MOTIONS
from trainer_wan.tiny import measure, render, scenes

if TYPE_CHECKING:
    import numpy as np

CHECKPOINT = Path(__file__).parents[2] / "tiny-wan"
LORA = "pytorch_lora_weights.safetensors"
PICTURE, REPORT = "before_after.png", "learned.json"
SEED = 100
SHOWN, SHOWN_FRAMES = 4, (0, 4, 8, 12, 16)
SCALE = 2
LABEL, MARGIN = 16, 6


def concept_scenes(shape: str, n: int) -> list[scenes.Scene]:
    """Return ``n`` captions of a new shape, going round colours, motions and backgrounds."""
    grounds = sorted(scenes.BACKGROUNDS)
    colours, motions = sorted(scenes.COLOURS), list(MOTIONS)
    return [
        scenes.Scene(
            colours[k % len(colours)],
            shape,
            motions[(k + k // len(colours)) % len(motions)],
            grounds[(k // 2) % len(grounds)],
        )
        for k in range(n)
    ]


def judge(output: Path, *, checkpoint: Path = CHECKPOINT, shape: str = "bar", n: int = 24) -> None:
    """Render new and old captions without and with the run's LoRA; print, and write both files."""
    from diffusers import WanPipeline

    if not (output / LORA).is_file():
        raise SystemExit(f"{output} holds no {LORA}; name the output folder of a finished run")
    display = Display()
    new, old = concept_scenes(shape, n), scenes.split()[1][:n]
    pipeline = WanPipeline.from_pretrained(checkpoint, use_safetensors=True)
    found: dict[str, Any] = {}
    clips: dict[str, list[np.ndarray[Any, Any]]] = {}
    with display.task("render", 4 * n, every=12) as advance:
        for when in ("before", "after"):
            if when == "after":
                pipeline.load_lora_weights(output, weight_name=LORA)
            for name, chosen in (("new", new), ("old", old)):
                captions = [scene.caption for scene in chosen]
                frames = render.render(pipeline, captions, seed=SEED, done=advance)
                clips[f"{name} {when}"] = frames
                found[f"{name} {when}"] = measure.score(frames, chosen)
    picture(clips["new before"], clips["new after"], new, output / PICTURE)
    report = {
        "held_out_loss": held_out(output),
        "scores": {name: vars(score) for name, score in found.items()},
    }
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in lines(report["held_out_loss"], found, shape, output):
        display.say(line)


def held_out(output: Path) -> dict[str, list[float]]:
    """Return the held-out loss before the first step and after the last one, by dataset."""
    values: dict[str, list[float]] = {}
    for line in (output / "events.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        if event["kind"] == "eval":
            for key, value in event.items():
                if key.startswith("eval/"):
                    values.setdefault(key.removeprefix("eval/"), []).append(value)
    return {name: [found[0], found[-1]] for name, found in values.items()}


def lines(
    losses: dict[str, list[float]], found: dict[str, measure.Score], shape: str, output: Path
) -> Sequence[str]:
    """Return what was learned, in a few lines."""
    said = ["What was learned:"]
    for name, (before, after) in losses.items():
        said.append(f"  held-out loss ({name})  {before:.4f} before, {after:.4f} after")
    for title, name in ((f'"a ... {shape} ..."', "new"), ("captions it knew", "old")):
        said.append(f"  {title}, {found[f'{name} before'].num_clips} clips")
        for when in ("before", "after"):
            said.append(f"    {when + ':':8}{found[f'{name} {when}']}")
    said.append(f"In {output}: {PICTURE} (above without the LoRA, below with it) and {REPORT}")
    return said


def picture(
    before: Sequence[Any], after: Sequence[Any], chosen: Sequence[scenes.Scene], path: Path
) -> None:
    """Write frames of the first captions, without the LoRA above and with it below."""
    import numpy as np
    from PIL import Image, ImageDraw

    edge = scenes.SIZE * SCALE
    width = len(SHOWN_FRAMES) * edge + 2 * MARGIN
    height = LABEL + 2 * edge + 2 * MARGIN
    columns, shown = 2, min(SHOWN, len(chosen))
    sheet = Image.new("RGB", (columns * width, -(-shown // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number in range(shown):
        left, top = (number % columns) * width + MARGIN, (number // columns) * height + MARGIN
        draw.text((left, top), chosen[number].caption, fill="black")
        for row, clips in enumerate((before, after)):
            strip = np.concatenate([clips[number][k] for k in SHOWN_FRAMES], axis=1)
            size = (strip.shape[1] * SCALE, strip.shape[0] * SCALE)
            image = Image.fromarray(strip).resize(size, Image.Resampling.NEAREST)
            sheet.paste(image, (left, top + LABEL + row * edge))
    sheet.save(path)
