"""Renders captions with diffusers' own pipeline, so that a score says something about the files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainer_wan.tiny.scenes import FRAMES, SIZE

if TYPE_CHECKING:
    import numpy as np
    from diffusers import WanPipeline

STEPS, GUIDANCE = 20, 3.0
AT_ONCE = 12


def render(
    pipeline: WanPipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    done: Callable[[int], None] = lambda number: None,
) -> list[np.ndarray[Any, Any]]:
    """Return the frames (17, 64, 64, 3) uint8 of each caption.

    Caption k starts from the noise of seed + k, whatever else is rendered. done: called with the number
    of clips after each portion.
    """
    import torch

    pipeline.set_progress_bar_config(disable=True)
    clips: list[np.ndarray[Any, Any]] = []
    for first in range(0, len(captions), AT_ONCE):
        part = list(captions[first : first + AT_ONCE])
        generators = [
            torch.Generator().manual_seed(seed + first + number) for number in range(len(part))
        ]
        frames = pipeline(
            part,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).frames
        clips += list((frames * 255).round().astype("uint8"))
        done(len(part))
    return clips
