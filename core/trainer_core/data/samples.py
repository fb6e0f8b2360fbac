"""Which clips a file gives: frames and crop of each, drawn from (seed, sample, pass) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from trainer_core import rng
from trainer_core.data.buckets import crop_plan, resized, target_size, too_small
from trainer_core.data.frames import (
    Lengths,
    Refusal,
    clip_length,
    effective_rate,
    frames_at,
    rate_of,
    starts,
)
from trainer_core.data.types import CropPlan, Dataset, FramePlan, MediaFile, Probe, Sample
from trainer_core.types import ModelSpec


@dataclass(slots=True)
class _Source:
    """What all files with one header share. crop: None when it is drawn for each clip."""

    probe: Probe
    available: int
    count: int
    crop: CropPlan | None
    plans: dict[int, FramePlan]
    rate: Fraction | None

    def frames(self, start: int) -> FramePlan:
        """Return the plan of a clip; equal ones are one object, which keeps a million small."""
        if start not in self.plans:
            self.plans[start] = FramePlan(start, self.count, self.rate)
        return self.plans[start]


@dataclass
class Clips:
    """Makes the samples of one dataset's files."""

    dataset: Dataset
    spec: ModelSpec
    lengths: Lengths
    seed: int
    _sources: dict[int, _Source | str] = field(default_factory=dict)
    _plans: dict[tuple[int, Fraction | None], dict[int, FramePlan]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dataset = self.dataset
        self.uses = 1 if dataset.held_out else dataset.repeats + 1
        self.drawn = dataset.crop_style == "random" or dataset.crop_aspect == "random"

    def of(self, number: int, file: MediaFile) -> Iterator[Sample]:
        """Yield the samples of file ``number``; sets ``file.skipped`` when there is none."""
        found = file.probe
        assert found is not None
        # by identity: files of one kind share their probe, and hashing one is slow
        source = self._sources.get(id(found))
        if source is None:
            source = self._sources[id(found)] = self._source(found)
        if isinstance(source, str):
            file.skipped = source
            return
        name = f"{self.dataset.id}/{file.name}"

        def draw(turn: int, options: int) -> int:
            return rng.seed_of(self.seed, "data/position", name, turn) % options

        places = starts(
            source.available, source.count, selection=self.dataset.frame_selection, uses=self.uses,
            draw=draw,
        )  # fmt: skip
        if source.crop is not None and len(places) == 1:
            start, times = places[0]
            yield Sample(number, 0, source.frames(start), source.crop, times)
            return
        yield from self._several(number, name, source, places)

    def _several(
        self, number: int, name: str, source: _Source, places: list[tuple[int, int]]
    ) -> Iterator[Sample]:
        """Yield a sample for each different clip; equal draws are one clip used more often."""
        made: dict[tuple[int, CropPlan], Sample] = {}
        variant = 0
        for start, times in places:
            for share in [1] * times if source.crop is None else [times]:
                crop = source.crop or self._crop(source.probe, name, start, variant)
                new = Sample(number, variant, source.frames(start), crop, 0)
                made.setdefault((start, crop), new).uses += share
                variant += 1
        yield from made.values()

    def _source(self, found: Probe) -> _Source | str:
        dataset, rate = self.dataset, None
        if why := too_small(found.width, found.height, dataset):
            return why
        available, count = 1, 1
        if found.kind == "video":
            rate = effective_rate(found.rate, rate_of(dataset, self.spec))
            available = frames_at(found, rate)
            length = clip_length(available, self.lengths, self.spec)
            if isinstance(length, Refusal):
                return length.reason
            count = length
        crop = None if self.drawn else self._crop(found, "", 0, 0)
        plans = self._plans.setdefault((count, rate), {})
        return _Source(found, available, count, crop, plans, rate)

    def _crop(self, found: Probe, name: str, start: int, variant: int) -> CropPlan:
        draws = 0

        def draw(options: int) -> int:
            nonlocal draws
            draws += 1
            return rng.seed_of(self.seed, "data/crop", name, start, variant, draws) % options

        width, height, dataset = found.width, found.height, self.dataset
        target = target_size(width, height, dataset, self.spec, draw=draw)
        size = resized(width, height, target, dataset)
        return crop_plan(size, target, dataset.crop_style, draw=draw)
