"""Shows a plan: every file with its bucket, span, frames and tokens, or why it is not used."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from trainer_core.data.buckets import native_hints
from trainer_core.data.frames import rate_of
from trainer_core.data.plan import DataPlan
from trainer_core.data.sampler import Sampler
from trainer_core.data.types import Dataset, Sample, plain

if TYPE_CHECKING:
    from rich.console import Console

FILE_COLUMNS = ("file", "source", "bucket", "span", "frames", "tokens", "note")
BUCKET_COLUMNS = ("dataset", "bucket", "samples", "uses per epoch", "tokens per step")

ONLY_WIDE = ("source", "frames")
"""Columns left out below a width of :data:`WIDE`: the bucket tells the frames as well."""
WIDE = 110


def render_report(plan: DataPlan, console: Console, *, most_files: int | None = None) -> None:
    """Print the plan: tables in a terminal, plain lines elsewhere.

    most_files: of datasets with more files, only those that are not used are listed.
    """
    for number, dataset in enumerate(plan.datasets):
        title = f"dataset {dataset.id} ({dataset.folder})"
        many = most_files is not None and _num_files(plan, number) > most_files
        rows = file_rows(plan, number, unused_only=many)
        if many:
            title += ": only what is not used; `trainer data` lists every clip"
        _table(console, title, FILE_COLUMNS, rows)
    _table(console, "buckets", BUCKET_COLUMNS, bucket_rows(plan))
    for line in [*summary(plan), *(f"note: {text}" for text in notes(plan))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for text in warnings(plan):
        console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


def _table(
    console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]
) -> None:
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    if not console.is_terminal:
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        for row in rows:
            cells = [
                f"{c} {v}" if k else v for k, (c, v) in enumerate(zip(columns, row, strict=True))
            ]
            line = "  " + "  ".join(c for c, v in zip(cells, row, strict=True) if v)
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= WIDE
    kept = [k for k, column in enumerate(columns) if wide or column not in ONLY_WIDE]
    table = Table(title=title, title_justify="left")
    for k in kept:
        whole = columns[k] not in ("file", "dataset", "source", "note")
        table.add_column(columns[k], overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(row[k]) for k in kept))
    console.print(table)


def printable(text: str) -> str:
    """Return a text on one line without control characters, as names of files may hold them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _num_files(plan: DataPlan, number: int) -> int:
    return sum(file.dataset == number for file in plan.files)


def file_rows(plan: DataPlan, number: int, *, unused_only: bool = False) -> list[tuple[str, ...]]:
    """Return a row of :data:`FILE_COLUMNS` for every clip of a dataset and every skipped file.

    unused_only: leave out the clips that are trained on.
    """
    left_out = {i: why for bucket, why in plan.dropped for i in bucket.samples}
    samples: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(plan.samples):
        samples[sample.file].append(index)
    rows: list[tuple[str, ...]] = []
    for position, file in enumerate(plan.files):
        if file.dataset != number:
            continue
        if file.skipped or not samples[position]:
            rows.append(
                (file.name, _source(plan, position), "", "", "", "", f"skipped: {file.skipped}")
            )
        for index in samples[position]:
            if unused_only and index not in left_out:
                continue
            note = f"left out: {left_out[index]}" if index in left_out else _note(plan, index)
            rows.append(
                (file.name, _source(plan, position), *_clip(plan, plan.samples[index]), note)
            )
    return rows


def _source(plan: DataPlan, position: int) -> str:
    probe = plan.files[position].probe
    if probe is None:
        return ""
    if probe.kind == "image":
        return f"{probe.width}x{probe.height}"
    rate = plain(round(float(probe.rate), 2))
    return f"{probe.width}x{probe.height} {probe.frames} frames at {rate} fps"


def _clip(plan: DataPlan, sample: Sample) -> tuple[str, str, str, str]:
    crop, frames = sample.crop, sample.frames
    tokens = plan.spec.tokens(frames.count, crop.height, crop.width)
    probe = plan.files[sample.file].probe
    assert probe is not None
    span = ""
    if probe.kind == "video":
        rate = frames.rate or probe.rate
        first, last = frames.start / rate, (frames.start + frames.count) / rate
        span = f"{float(first):.2f}-{float(last):.2f} s"
    return f"{crop.width}x{crop.height}@{frames.count}", span, str(frames.count), str(tokens)


def _note(plan: DataPlan, index: int) -> str:
    sample = plan.samples[index]
    file, dataset = plan.files[sample.file], plan.dataset_of(sample)
    parts = [file.note]
    assert file.probe is not None
    if file.probe.kind == "video":
        parts.append(plan.lengths[file.dataset].note)
        wanted = rate_of(dataset, plan.spec)
        if wanted and sample.frames.rate:
            rates = f"{plain(round(float(file.probe.rate), 2))} -> {plain(round(float(wanted), 2))}"
            parts.append(f"{rates} fps")
        elif wanted and _is_slow(plan, sample):
            parts.append("slower source, keeps its frames")
    if sample.uses > 1:
        parts.append(f"{sample.uses} uses")
    return ", ".join(part for part in parts if part)


def _is_slow(plan: DataPlan, sample: Sample) -> bool:
    file = plan.files[sample.file]
    wanted = rate_of(plan.datasets[file.dataset], plan.spec)
    probe = file.probe
    if wanted is None or probe is None or probe.kind == "image":
        return False
    return float(probe.rate) < float(wanted) * 0.99


def bucket_rows(plan: DataPlan) -> list[tuple[str, ...]]:
    """Return a row of :data:`BUCKET_COLUMNS` for every bucket that is kept."""
    settings = plan.settings
    rows: list[tuple[str, ...]] = []
    for bucket in plan.buckets:
        dataset = plan.datasets[bucket.dataset]
        tokens = plan.spec.tokens(bucket.frames, bucket.height, bucket.width)
        clips = 1 if dataset.held_out else (
            min(settings.train_batch_size, bucket.uses) * settings.gradient_accumulation_steps
        )  # fmt: skip
        name = f"{dataset.id} (held out)" if dataset.held_out else dataset.id
        uses = "" if dataset.held_out else str(bucket.uses)
        rows.append((name, bucket.name, str(len(bucket.samples)), uses, str(tokens * clips)))
    return rows


def summary(plan: DataPlan) -> list[str]:
    """Return the totals in sentences."""
    used = {plan.samples[i].file for bucket in plan.buckets for i in bucket.samples}
    skipped = len(plan.files) - len(used)
    clips = sum(len(bucket.samples) for bucket in plan.buckets)
    lines = [
        f"{len(used)} files used, {skipped} not used, {clips} clips in {len(plan.buckets)} buckets"
    ]
    sampler = Sampler(plan)
    if sampler.buckets:
        batches = sampler.groups_per_epoch
        steps = -(-batches // plan.settings.gradient_accumulation_steps)
        lines.append(f"an epoch is {batches} batches, {steps} optimiser steps")
    return lines


def notes(plan: DataPlan) -> list[str]:
    """Return what is worth knowing and needs no action."""
    found = list(plan.backends.notes)
    for dataset, lengths in zip(plan.datasets, plan.lengths, strict=True):
        if lengths.note and "video" in dataset.kinds:
            found.append(
                f"{dataset.id}: num_frames {lengths.note}, since a clip of this model has "
                f"{plan.spec.frame_stride}n+1 frames"
            )
    for name, missing in Sampler(plan).filled.items():
        found.append(f"{name}: the last batch is filled with {missing} samples of the same bucket")
    for number, dataset in enumerate(plan.datasets):
        size = dataset.vae_batch_size or plan.settings.vae_batch_size
        clips = sum(len(b.samples) for b in plan.buckets if b.dataset == number)
        if clips < size:
            found.append(f"{dataset.id}: {clips} clips are encoded in one batch below {size}")
    return found


def warnings(plan: DataPlan) -> list[str]:
    """Return what probably makes the result worse, with the way out."""
    found = []
    for number, dataset in enumerate(plan.datasets):
        found += [f"{dataset.id}: {text}" for text in _of_dataset(plan, number, dataset)]
    for bucket, why in plan.dropped:
        found.append(f"{plan.datasets[bucket.dataset].id}: bucket {bucket.name} is left out: {why}")
    return found


def _of_dataset(plan: DataPlan, number: int, dataset: Dataset) -> list[str]:
    found: list[str] = []
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    slow: set[int] = set()
    enlarged: set[int] = set()
    for bucket in plan.buckets:
        for sample in (plan.samples[i] for i in bucket.samples if bucket.dataset == number):
            probe = plan.files[sample.file].probe
            assert probe is not None
            sizes[bucket.width, bucket.height].append((probe.width, probe.height))
            if _is_slow(plan, sample):
                slow.add(sample.file)
            if sample.crop.resize_w > probe.width:
                enlarged.add(sample.file)
    if hint := native_hints(sizes, dataset, plan.spec):
        found.append(f"{'bucket' if ' is not a size ' in hint else 'buckets'} {hint}")
    if slow:
        found.append(
            f"{len(slow)} files are slower than {plain(float(rate_of(dataset, plan.spec) or 0))} "
            "fps; they keep their own frames and look faster than they are"
        )
    if enlarged:
        found.append(
            f"{len(enlarged)} files are smaller than their bucket and are enlarged; "
            "minimum_image_size leaves them out"
        )
    if dataset.bucket_strategy == "resolution_frames" and dataset.num_frames:
        found.append(
            "bucket_strategy resolution_frames with num_frames has clips of one length only"
        )
    return found
