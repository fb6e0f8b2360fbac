"""From the datasets to samples and buckets: every file is used, or skipped with the reason."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from trainer_core import rng
from trainer_core.data.backends import Backends
from trainer_core.data.buckets import crop_plan, resized, target_size, too_small
from trainer_core.data.captions import NoCaption, caption_reader
from trainer_core.data.frames import (
    Lengths,
    Refusal,
    clip_length,
    effective_rate,
    frame_plan,
    frames_at,
    lengths_of,
    rate_of,
    starts,
)
from trainer_core.data.probe import Unreadable, probe
from trainer_core.data.sources import Found, listing
from trainer_core.data.store import Stamp, Store
from trainer_core.data.types import (
    Bucket,
    CropPlan,
    Dataset,
    MediaFile,
    Probe,
    Progress,
    Sample,
    no_progress,
)
from trainer_core.errors import DataError
from trainer_core.settings.core import CoreSettings
from trainer_core.types import ModelSpec


@dataclass
class DataPlan:
    """What is trained on. files: all media; samples and buckets: what is left of them.

    dropped: buckets that are too small, with the reason. Held-out datasets have buckets too.
    lengths: per dataset.
    """

    backends: Backends
    settings: CoreSettings
    spec: ModelSpec
    world_size: int
    files: list[MediaFile]
    lengths: list[Lengths]
    samples: list[Sample] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    dropped: list[tuple[Bucket, str]] = field(default_factory=list)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """The enabled datasets, in the order of the file."""
        return self.backends.datasets

    @property
    def group_size(self) -> int:
        """Samples of one micro-batch over all processes."""
        return self.settings.train_batch_size * self.world_size

    def dataset_of(self, sample: Sample) -> Dataset:
        """Return the dataset of a sample."""
        return self.datasets[self.files[sample.file].dataset]

    def path_of(self, file: MediaFile) -> Path:
        """Return where a file lies."""
        return self.datasets[file.dataset].folder / file.name

    def stamp_of(self, file: MediaFile) -> Stamp:
        """Return what the store knows a file by."""
        folder = self.datasets[file.dataset].folder
        return f"{folder}/{file.name}", file.size, file.mtime_ns

    def sample_id(self, sample: Sample) -> str:
        """Return a name for messages, such as my-clips/walk.mp4 or my-clips/walk.mp4#73."""
        file = self.files[sample.file]
        tail = f"#{sample.frames.start}" if sample.frames.start else ""
        return f"{self.datasets[file.dataset].id}/{file.name}{tail}"

    @property
    def digest(self) -> str:
        """Digest of the samples: sources, captions, frames, crops, passes, buckets.

        It changes when the set of samples or the plan of one changes.
        """
        state = hashlib.blake2b(digest_size=20)
        for bucket in self.buckets:
            dataset = self.datasets[bucket.dataset]
            head = (dataset.id, bucket.name, str(dataset.probability), str(self.group_size))
            state.update("\x1f".join(head).encode() + b"\x1e")
            for index in bucket.samples:
                sample = self.samples[index]
                file = self.files[sample.file]
                parts = (
                    file.name, file.digest, *file.captions, sample.frames.key, sample.crop.key,
                    str(sample.uses),
                )  # fmt: skip
                state.update("\x1f".join(parts).encode("utf-8", "surrogateescape") + b"\x1e")
        return state.hexdigest()

    def arrange(self) -> None:
        """Make samples and buckets anew from what is known of the files; raises DataError."""
        self.samples = [
            sample
            for number, file in enumerate(self.files)
            if not file.skipped
            for sample in _samples_of(self, number, file)
        ]
        self._make_buckets()
        self._check()

    def _make_buckets(self) -> None:
        groups: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            crop = sample.crop
            owner = self.files[sample.file].dataset
            groups[owner, crop.width, crop.height, sample.frames.count].append(index)
        self.buckets, self.dropped = [], []
        for key in sorted(groups):
            uses = sum(self.samples[index].uses for index in groups[key])
            bucket = Bucket(*key, samples=tuple(groups[key]), uses=uses)
            if why := self._too_few(bucket):
                self.dropped.append((bucket, why))
            else:
                self.buckets.append(bucket)

    def _too_few(self, bucket: Bucket) -> str:
        settings, dataset = self.settings, self.datasets[bucket.dataset]
        need = self.group_size * settings.gradient_accumulation_steps
        if dataset.held_out or settings.disable_bucket_pruning or bucket.uses >= need:
            return ""
        passes = -(-need * (dataset.repeats + 1) // bucket.uses)
        return (
            f"{bucket.uses} samples counted with repeats, {need} are needed (train_batch_size "
            f"{settings.train_batch_size} x gradient_accumulation_steps "
            f"{settings.gradient_accumulation_steps} x {self.world_size} processes); "
            f"repeats {passes - 1} is enough"
        )

    def _check(self) -> None:
        alive = {bucket.dataset for bucket in self.buckets}
        lines = []
        for number, dataset in enumerate(self.datasets):
            if number in alive:
                continue
            lines.append(f"no samples detected in dataset {dataset.id} ({dataset.folder})")
            lines += [f"  bucket {b.name}: {why}" for b, why in self.dropped if b.dataset == number]
            reasons: dict[str, list[str]] = defaultdict(list)
            for file in self.files:
                if file.dataset == number and file.skipped:
                    reasons[file.skipped].append(file.name)
            lines += [
                f"  {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
                for reason, names in list(reasons.items())[:8]
            ]
            if any(b.dataset == number for b, _ in self.dropped):
                lines.append(
                    "  Raise repeats of the dataset, lower train_batch_size, or set "
                    "disable_bucket_pruning."
                )
            elif not reasons:
                lines.append(f"  The folder holds no {' or '.join(sorted(dataset.kinds))} files.")
        if lines:
            raise DataError("\n".join(lines))


def plan_data(
    backends: Backends,
    settings: CoreSettings,
    spec: ModelSpec,
    *,
    say: Callable[[str], None],
    progress: Progress = no_progress,
    world_size: int = 1,
) -> DataPlan:
    """Return the plan of all datasets from headers and captions alone; nothing is decoded.

    Raises DataError when a dataset has nothing left.
    """
    with Store(backends.index) as store:
        if store.replaced:
            say(f"{backends.index} was damaged and is made anew")
        files = [
            file
            for number, dataset in enumerate(backends.datasets)
            for file in _files_of(number, dataset, store, progress)
        ]
    plan = DataPlan(
        backends=backends,
        settings=settings,
        spec=spec,
        world_size=world_size,
        files=files,
        lengths=[lengths_of(dataset, spec) for dataset in backends.datasets],
    )
    plan.arrange()
    return plan


def _files_of(
    number: int, dataset: Dataset, store: Store, progress: Progress
) -> Iterator[MediaFile]:
    found = listing(dataset.folder)
    captions = caption_reader(dataset, found, store)
    media = [item for item in found.values() if item.kind or item.problem]
    root = str(dataset.folder)
    stamps = [(f"{root}/{i.name}", i.size, i.mtime_ns) for i in media if not i.problem]
    known = store.probes(stamps)
    with progress(f"probe {dataset.id}", len(media)) as advance:
        for item in media:
            file = MediaFile(number, item.name, item.size, item.mtime_ns)
            file.skipped = item.problem or _wrong_kind(item, dataset)
            if not file.skipped:
                _look_at(file, item, dataset, known.get(f"{root}/{item.name}"), store)
            if not file.skipped:
                try:
                    file.captions = captions(item.name)
                except NoCaption as error:
                    file.skipped = str(error)
            advance(1)
            yield file


def _wrong_kind(item: Found, dataset: Dataset) -> str:
    if item.kind in dataset.kinds:
        return ""
    return f"{item.kind} files are not taken by dataset_type {'/'.join(sorted(dataset.kinds))}"


def _look_at(file: MediaFile, item: Found, dataset: Dataset, known: object, store: Store) -> None:
    if known is None:
        assert item.kind is not None
        path = dataset.folder / item.name
        try:
            known = probe(path, item.kind)
        except Unreadable as error:
            known = str(error)
        store.remember_probe((str(path), item.size, item.mtime_ns), known)
    if isinstance(known, Probe):
        file.probe = known
    else:
        file.skipped = str(known)


@lru_cache(maxsize=65536)
def _length(
    found: Probe, dataset: Dataset, lengths: Lengths, spec: ModelSpec
) -> tuple[Fraction | None, int, int | Refusal]:
    """Return (rate, frames that the file gives at it, length of its clips or why none)."""
    if found.kind == "image":
        return None, 1, 1
    rate = effective_rate(found.rate, rate_of(dataset, spec))
    available = frames_at(found, rate)
    return rate, available, clip_length(available, lengths, spec)


def _samples_of(plan: DataPlan, number: int, file: MediaFile) -> Iterator[Sample]:
    """Yield the samples of a file; sets ``file.skipped`` when there is none."""
    dataset, spec, found = plan.datasets[file.dataset], plan.spec, file.probe
    assert found is not None
    if why := too_small(found.width, found.height, dataset):
        file.skipped = why
        return
    rate, available, count = _length(found, dataset, plan.lengths[file.dataset], spec)
    if isinstance(count, Refusal):
        file.skipped = count.reason
        return
    seed, name = plan.settings.seed, f"{dataset.id}/{file.name}"
    uses = 1 if dataset.held_out else dataset.repeats + 1

    def draw_start(number: int, options: int) -> int:
        return rng.seed_of(seed, "data/position", name, number) % options

    made: dict[tuple[object, object], Sample] = {}
    places = starts(available, count, selection=dataset.frame_selection, uses=uses, draw=draw_start)
    drawn = dataset.crop_style == "random" or dataset.crop_aspect == "random"
    variant = 0
    for start, times in places:
        frames = frame_plan(start, count, rate)
        for share in [1] * times if drawn else [times]:
            crop = _crop_of(dataset, spec, file, key=(seed, name, start, variant))
            variant += 1
            sample = made.setdefault((frames, crop), Sample(number, variant - 1, frames, crop, 0))
            sample.uses += share
    yield from made.values()


def _crop_of(
    dataset: Dataset, spec: ModelSpec, file: MediaFile, *, key: tuple[int, str, int, int]
) -> CropPlan:
    assert file.probe is not None
    width, height = file.probe.width, file.probe.height
    seed, name, start, variant = key
    draws = 0

    def draw(options: int) -> int:
        nonlocal draws
        draws += 1
        return rng.seed_of(seed, "data/crop", name, start, variant, draws) % options

    target = target_size(width, height, dataset, spec, draw=draw)
    return crop_plan(resized(width, height, target, dataset), target, dataset.crop_style, draw=draw)
