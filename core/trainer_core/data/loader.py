"""Batches for the training loop, read ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer_core import rng
from trainer_core.data.cache import Damaged
from trainer_core.data.fill import CachedData
from trainer_core.data.sampler import Sampler
from trainer_core.data.types import Sample
from trainer_core.errors import PluginError
from trainer_core.transfer import pinned, sent
from trainer_core.types import Batch, Moment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer_core.run import Run

WAIT_S = 0.2


class Loader:
    """Iterates optimiser steps without end; each item is the list of its micro-batches.

    start_step: steps that are done already; the first item belongs to step ``start_step + 1``.
    prefetch: steps that are read ahead. Everything random is drawn from (seed, step, micro step,
    rank, place in the batch), so that a run that goes on in the middle of an epoch gets the batches
    that it would have got.
    """

    def __init__(self, data: CachedData, run: Run, *, start_step: int, prefetch: int = 2) -> None:
        self.data, self.run, self.start_step = data, run, start_step
        self.sampler = Sampler(data.plan)
        self.accumulation = run.settings.gradient_accumulation_steps
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(prefetch, 1))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process in an epoch."""
        return self.sampler.groups_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch, the last one included that reaches into the next epoch."""
        return -(-self.batches_per_epoch // self.accumulation)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 1, in which optimiser step ``step`` (from 1) begins."""
        return (max(step, 1) - 1) * self.accumulation // self.batches_per_epoch + 1

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
            self._thread.start()
        step = self.start_step
        while not self._closed.is_set():
            step += 1
            found = self._queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                # damaged entries are rebuilt here: the encoder's plugin is never called in a thread
                found = [self._whole(step, micro) for micro in range(self.accumulation)]
            yield [self._placed(batch) for batch in found]

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(WAIT_S)

    def _read_ahead(self) -> None:
        import torch

        step = self.start_step
        if self.run.device.type == "cuda":  # pinning belongs to this thread's device
            torch.cuda.set_device(self.run.device)
        while not self._closed.is_set():
            step += 1
            found: Any
            try:
                found = [self._read(step, micro) for micro in range(self.accumulation)]
            except Damaged:
                found = None
            except BaseException as error:
                found = error
            while not self._closed.is_set():
                try:
                    self._queue.put(found, timeout=WAIT_S)
                    break
                except queue.Full:
                    continue
            if isinstance(found, BaseException):
                return

    def _chosen(self, step: int, micro: int) -> tuple[list[Sample], list[str], Moment]:
        """Return the samples of a micro-batch and the caption that each is trained with."""
        moment = Moment(step=step, micro=micro, rank=self.run.rank)
        number = (step - 1) * self.accumulation + micro
        indices = self.sampler.batch(number, self.run.rank)
        samples = [self.data.plan.samples[index] for index in indices]
        captions = [self._caption(sample, moment, place) for place, sample in enumerate(samples)]
        return samples, captions, moment

    def _caption(self, sample: Sample, moment: Moment, place: int) -> str:
        import torch

        at = (moment.step, moment.micro, moment.rank, place)
        seed, share = self.run.seed, self.run.settings.caption_dropout_probability
        if share > 0:
            drawn = rng.generator(seed, "data/caption_dropout", *at)
            if torch.rand((), generator=drawn).item() < share:
                return ""
        choices = self.data.plan.files[sample.file].captions
        if len(choices) == 1:
            return choices[0]
        drawn = rng.generator(seed, "data/caption", *at)
        return choices[int(torch.randint(len(choices), (), generator=drawn).item())]

    def _read(self, step: int, micro: int) -> Batch:
        samples, captions, moment = self._chosen(step, micro)
        return self._moved(self._batch(samples, captions, moment), pinned)

    def _batch(self, samples: Sequence[Sample], captions: Sequence[str], at: Moment) -> Batch:
        """Return a batch on the CPU; raises Damaged."""
        clips = [self.data.read_clip(sample) for sample in samples]
        texts = [self.data.read_text(caption) for caption in captions]
        names = tuple(self.data.plan.sample_id(sample) for sample in samples)
        tensors: dict[str, Tensor] = {}
        for reads, rows in (("pixels", clips), ("caption", texts)):
            for encoder in self.data.of(reads):
                for tensor in encoder.writes:
                    values = [row[tensor.name] for row in rows if tensor.name in row]
                    if len(values) < len(rows):  # its plugin is done with it
                        continue
                    who = f"encoder {encoder.name!r}: {tensor.name!r}"
                    tensors[tensor.name] = stack(values, pad_to=tensor.pad_to, who=who, names=names)
        latents = tensors.pop("latents").float()
        dataset = self.data.plan.dataset_of(samples[0]).id
        return Batch(latents, tensors, names, tuple(captions), dataset, at)

    def _whole(self, step: int, micro: int) -> Batch:
        samples, captions, moment = self._chosen(step, micro)
        return self._rebuilt(samples, captions, moment)

    def _rebuilt(self, samples: Sequence[Sample], captions: Sequence[str], at: Moment) -> Batch:
        """Return a batch whose damaged entries are encoded again first."""
        for sample in samples:
            try:
                self.data.read_clip(sample)
            except Damaged as damage:
                self.data.rebuild_clip(sample, damage)
        for caption in captions:
            self.data.read_caption(caption)
        return self._batch(samples, captions, at)

    def _placed(self, batch: Batch) -> Batch:
        """Return the batch on the device of the run."""
        return self._moved(batch, sent)

    def _moved(self, batch: Batch, move: Callable[[Tensor, torch.device], Tensor]) -> Batch:
        device = self.run.device
        if device.type == "cpu":
            return batch
        conditioning = {name: move(value, device) for name, value in batch.conditioning.items()}
        return replace(batch, latents=move(batch.latents, device), conditioning=conditioning)

    def eval_batches(self, limit: int) -> dict[str, list[Batch]]:
        """Return up to ``limit`` held-out samples of each eval dataset, one per batch.

        First caption, no dropout; always the same ones.
        """
        plan, found = self.data.plan, {}
        for number, dataset in enumerate(plan.datasets):
            if not dataset.held_out:
                continue
            indices = sorted(i for b in plan.buckets if b.dataset == number for i in b.samples)
            batches = []
            for place, index in enumerate(indices[:limit]):
                sample = plan.samples[index]
                caption = plan.files[sample.file].captions[0]
                moment = Moment(step=0, micro=place, rank=0)
                batches.append(self._placed(self._rebuilt([sample], [caption], moment)))
            found[dataset.id] = batches
        return found


def stack(
    values: Sequence[Tensor], *, pad_to: int | None, who: str, names: Sequence[str] = ()
) -> Tensor:
    """Return (B, ...) of tensors, zero-padded along dim 0 to ``pad_to`` first."""
    import torch

    if pad_to is not None:
        longest = max(value.shape[0] for value in values)
        if longest > pad_to:
            raise PluginError(f"{who} has length {longest}, but declares pad_to {pad_to}")
        values = [
            torch.cat([value, value.new_zeros(pad_to - value.shape[0], *value.shape[1:])])
            for value in values
        ]
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise PluginError(
            f"{who} has the shapes {sorted(shapes)} in one batch ({', '.join(names)}); "
            "declare pad_to, or write one shape per clip size"
        )
    return torch.stack(list(values))
