"""From the datasets to samples and buckets: every file is used, or skipped with the reason."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer_core.data.backends import Backends
from trainer_core.data.captions import NoCaption, caption_reader
from trainer_core.data.frames import Lengths, lengths_of
from trainer_core.data.memory import uncollected
from trainer_core.data.probe import Inaccessible, Unreadable, probe
from trainer_core.data.samples import Clips
from trainer_core.data.sources import Found, listing
from trainer_core.data.store import Stamp, Store
from trainer_core.data.types import (
    Bucket,
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
    def most_tokens(self) -> int:
        """Return the video tokens of the largest clip that is trained on."""
        tokens = [
            self.spec.tokens(bucket.frames, bucket.height, bucket.width)
            for bucket in self.buckets
            if not self.datasets[bucket.dataset].held_out
        ]
        return max(tokens, default=0)

    @property
    def clip_shapes(self) -> dict[tuple[int, int, int], int]:
        """Return (frames, height, width) in pixels → number of clips, held-out ones included."""
        found: dict[tuple[int, int, int], int] = {}
        for bucket in self.buckets:
            shape = (bucket.frames, bucket.height, bucket.width)
            found[shape] = found.get(shape, 0) + len(bucket.samples)
        return found

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
        with uncollected():
            self._make_samples()
        self._make_buckets()
        self._check()

    def _make_samples(self) -> None:
        clips = [
            Clips(dataset, self.spec, lengths, self.settings.seed)
            for dataset, lengths in zip(self.datasets, self.lengths, strict=True)
        ]
        self.samples = [
            sample
            for number, file in enumerate(self.files)
            if not file.skipped
            for sample in clips[file.dataset].of(number, file)
        ]

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
    with uncollected(), Store(backends.index) as store:
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
    # only what is opened is worth a bar: the rest is instant
    with progress(f"probe {dataset.id}", len(stamps) - len(known)) as advance:
        for item in media:
            file = MediaFile(number, item.name, item.size, item.mtime_ns)
            file.skipped = item.problem or _wrong_kind(item, dataset)
            if not file.skipped:
                answer = known.get(f"{root}/{item.name}")
                if answer is None:
                    answer = _look_at(item, dataset, store)
                    advance(1)
                if isinstance(answer, Probe):
                    file.probe = answer
                else:
                    file.skipped, file.broken = answer, True
            if not file.skipped:
                try:
                    file.captions = captions(item.name)
                except NoCaption as error:
                    file.skipped = str(error)
            yield file


def _wrong_kind(item: Found, dataset: Dataset) -> str:
    if item.kind in dataset.kinds:
        return ""
    return f"{item.kind} files are not taken by dataset_type {'/'.join(sorted(dataset.kinds))}"


def _look_at(item: Found, dataset: Dataset, store: Store) -> Probe | str:
    assert item.kind is not None
    path = dataset.folder / item.name
    try:
        answer: Probe | str = probe(path, item.kind)
    except Inaccessible as error:
        return str(error)  # not remembered: it may be readable the next time
    except Unreadable as error:
        answer = str(error)
    store.remember_probe((str(path), item.size, item.mtime_ns), answer)
    return answer
