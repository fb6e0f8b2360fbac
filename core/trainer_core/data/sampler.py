"""The order of samples: a pure function of (seed, epoch). Its state is a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer_core import rng
from trainer_core.data.plan import DataPlan
from trainer_core.data.types import Bucket

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Order = NDArray[np.int64]


class Sampler:
    """Groups of samples of one bucket, one group per micro-step of all processes.

    An epoch shows every sample as often as its dataset's repeats say; a bucket's last short group
    is filled with samples of the same bucket. With ``probability`` in a dataset the groups of an
    epoch are shared out by these weights (1 where none is given) instead.
    """

    def __init__(self, plan: DataPlan) -> None:
        self.plan, self.seed = plan, plan.settings.seed
        self.world_size = plan.world_size
        training = [b for b in plan.buckets if not plan.datasets[b.dataset].held_out]
        self.buckets: dict[int, list[Bucket]] = {}
        for bucket in training:
            self.buckets.setdefault(bucket.dataset, []).append(bucket)
        self.group_sizes = {id(b): self._group_size(b) for b in training}
        self.groups = {
            dataset: sum(-(-b.uses // self.group_sizes[id(b)]) for b in buckets)
            for dataset, buckets in self.buckets.items()
        }
        self.batches_per_epoch = sum(self.groups.values())
        self.shares = self._shares()
        self._orders: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        self._sequence: tuple[int, Order] | None = None

    def _group_size(self, bucket: Bucket) -> int:
        """Samples of a group; a bucket that is smaller than a batch trains in smaller batches."""
        if bucket.uses >= self.plan.group_size:
            return self.plan.group_size
        return -(-bucket.uses // self.world_size) * self.world_size

    def _shares(self) -> dict[int, int]:
        """Return the groups that each dataset has in an epoch."""
        weights = {d: self.plan.datasets[d].probability for d in self.buckets}
        if all(weight is None for weight in weights.values()):
            return dict(self.groups)
        total = sum(1.0 if w is None else w for w in weights.values())
        exact = {
            d: self.batches_per_epoch * (1.0 if w is None else w) / total
            for d, w in weights.items()
        }
        shares = {d: max(int(value), 1) for d, value in exact.items()}
        by_rest = sorted(exact, key=lambda d: (int(exact[d]) - exact[d], d))
        for dataset in by_rest[: max(self.batches_per_epoch - sum(shares.values()), 0)]:
            shares[dataset] += 1
        return shares

    @property
    def filled(self) -> dict[str, int]:
        """Bucket → how many samples fill its last group in an epoch."""
        return {
            f"{self.plan.datasets[b.dataset].id} {b.name}": -b.uses % self.group_sizes[id(b)]
            for buckets in self.buckets.values()
            for b in buckets
            if b.uses % self.group_sizes[id(b)]
        }

    @property
    def groups_per_epoch(self) -> int:
        """Micro-steps in an epoch."""
        return sum(self.shares.values())

    def group(self, number: int) -> tuple[int, ...]:
        """Return the sample indices of micro-step ``number`` (from 0) of the run."""
        epoch, position = divmod(number, self.groups_per_epoch)
        dataset, turn = self._at(epoch, position)
        # a dataset goes through its own epochs, whatever the share it has in one of the run
        own_epoch, place = divmod(epoch * self.shares[dataset] + turn, self.groups[dataset])
        return self._order(dataset, own_epoch)[place]

    def batch(self, number: int, rank: int) -> tuple[int, ...]:
        """Return the sample indices of one process in micro-step ``number``."""
        group = self.group(number)
        size = len(group) // self.world_size
        return group[rank * size : (rank + 1) * size]

    def _at(self, epoch: int, position: int) -> tuple[int, int]:
        """Return (dataset, how many groups of it came before in this epoch)."""
        import numpy as np

        if self._sequence is None or self._sequence[0] != epoch:
            line = np.repeat(np.fromiter(self.shares, dtype=np.int64), list(self.shares.values()))
            order = permutation(len(line), self.seed, "data/datasets", epoch)
            self._sequence = (epoch, line[order])
        line = self._sequence[1]
        dataset = int(line[position])
        return dataset, int((line[:position] == dataset).sum())

    def _order(self, dataset: int, epoch: int) -> list[tuple[int, ...]]:
        """Return a dataset's groups in the order of its own epoch."""
        key = (dataset, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != dataset}
            self._orders[key] = self._shuffled(dataset, epoch)
        return self._orders[key]

    def _shuffled(self, dataset: int, epoch: int) -> list[tuple[int, ...]]:
        name = self.plan.datasets[dataset].id
        groups: list[tuple[int, ...]] = []
        for bucket in self.buckets[dataset]:
            size = self.group_sizes[id(bucket)]
            uses = [i for i in bucket.samples for _ in range(self.plan.samples[i].uses)]
            order = permutation(len(uses), self.seed, "data/order", name, bucket.name, epoch)
            line = [uses[k] for k in order]
            line += _filling(line, -len(line) % size)
            groups += [tuple(line[k : k + size]) for k in range(0, len(line), size)]
        order = permutation(len(groups), self.seed, "data/groups", name, epoch)
        return [groups[k] for k in order]


def _filling(line: Sequence[int], missing: int) -> list[int]:
    """Return samples from the front of the line, again and again if it is short."""
    return [line[k % len(line)] for k in range(missing)]


def permutation(count: int, seed: int, purpose: str, *parts: int | str) -> Order:
    """Return a random order of ``count`` numbers that depends on the arguments alone."""
    import torch

    order: Order = torch.randperm(count, generator=rng.generator(seed, purpose, *parts)).numpy()
    return order
