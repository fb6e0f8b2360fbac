"""One clip on its own: to begin samples from, and encoded without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainer_core.data.decode import decode
from trainer_core.data.encoding import encode, loaded
from trainer_core.data.fill import CachedData
from trainer_core.types import EncoderSample

if TYPE_CHECKING:
    from torch import Tensor


def encode_clip(data: CachedData, clip: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return what encoders write under ``names`` for a clip (F, 3, H, W) uint8, uncached."""
    found: dict[str, Tensor] = {}
    for encoder in data.of("pixels"):
        if wanted := [each.name for each in encoder.writes if each.name in names]:
            with loaded(encoder) as network:
                sample = [EncoderSample(pixels=clip)]
                (result,) = encode(data.run, data.hooks, network, sample, ["a clip of its own"])
            found |= {name: result[name] for name in wanted}
    return found


def example(data: CachedData) -> Tensor:
    """Return the first clip (F, 3, H, W) uint8 of what is held out, else of all."""
    plan = data.plan
    held_out = [b for b in plan.buckets if plan.datasets[b.dataset].held_out]
    sample = plan.samples[(held_out or plan.buckets)[0].samples[0]]
    file = plan.files[sample.file]
    assert file.probe is not None
    return decode(plan.path_of(file), sample.frames, sample.crop, probe=file.probe)
