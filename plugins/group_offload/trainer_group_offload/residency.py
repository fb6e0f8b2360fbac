"""Which group is on the device when: one ahead in the forward pass, one behind in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer_core.linear import MOVES, RESIDENT
from trainer_group_offload.groups import Group


class BlockResidency:
    """Moves the groups of one stack of blocks.

    groups: of ``per_group`` blocks each, in order. ahead: the next group is fetched while one computes,
    so at most two are there instead of one. The group that a pass ends with stays, for the next pass
    begins with it: a training step copies each group at most once forward and once backward. A
    recompute lies inside the backward visit of its block and moves nothing.
    """

    def __init__(
        self, groups: Sequence[Group], *, per_group: int, num_blocks: int, ahead: bool
    ) -> None:
        self.groups = groups
        self.per_group = per_group
        self.num_blocks = num_blocks
        self.ahead = ahead
        self._backward: int | None = None
        self._with_grad = False

    def before(self, index: int, phase: str) -> None:
        """Make sure that the block's weights are there, and that the next ones are on their way."""
        if phase == "forward" and self._backward == index:
            return  # its recompute
        at = index // self.per_group
        if phase == "backward":
            self._backward, coming = index, at - 1
        else:
            self._with_grad = torch.is_grad_enabled()
            coming = at + 1
            if coming == len(self.groups):
                coming = -1 if self._with_grad else 0  # the next pass is backward, or forward again
        wanted = {at, coming} if self.ahead else {at}
        for number, group in enumerate(self.groups):
            if group.is_here and number not in wanted:
                group.drop()
        if not self.groups[at].is_here:
            self.groups[at].fetch()
        self.groups[at].wait()
        if self.ahead and coming >= 0 and not self.groups[coming].is_here:
            self.groups[coming].fetch()

    def after(self, index: int, phase: str) -> None:
        """Drop the block's group behind its last block, unless the next pass begins with it."""
        if phase == "forward" and self._backward == index:
            return
        at = index // self.per_group
        if phase == "backward":
            self._backward = None
            if at > 0 and index % self.per_group == 0:
                self.groups[at].drop()
            return
        ends = index % self.per_group == self.per_group - 1 or index == self.num_blocks - 1
        last = at == len(self.groups) - 1
        stays = last and (self._with_grad or len(self.groups) == 1)
        if ends and not stays:
            self.groups[at].drop()

    @contextmanager
    def saving(self, index: int) -> Iterator[None]:
        """Keep autograd from holding a weight on the device: it saves the weight's name instead."""
        group = self.groups[index // self.per_group]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _packed(tensor, group), _unpacked
        ):
            yield


@dataclass(frozen=True)
class _View:
    """A view of a weight: which, and what of it."""

    group: Group
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _packed(tensor: Tensor, group: Group) -> Tensor | _View:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return tensor
    if (number := group.number(tensor)) is None:
        return tensor
    return _View(group, number, tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpacked(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    copy = packed.group.copy(packed.number)
    return copy.as_strided(packed.size, packed.stride, packed.offset)


class LeafResidency:
    """Moves the weights of single layers: each comes when the layer is called and goes behind it.

    In the backward pass a recomputed block holds what it needs until it is done.
    """

    def __init__(self, groups: Sequence[Group], wrappers: Mapping[nn.Module, nn.Module]) -> None:
        """wrappers: layer → the adapter around it, which may read the layer's weight by itself."""
        for group in groups:
            layer = group.slots[0].module
            called = wrappers.get(layer, layer)
            come, go = (
                _hook(lambda *_, group=group: _come(group)),
                _hook(lambda *_, group=group: group.drop()),
            )
            called.register_forward_pre_hook(come)
            called.register_forward_hook(go, always_call=True)
            for module in {layer, called}:
                setattr(module, RESIDENT, partial(_there, group))

    def before(self, index: int, phase: str) -> None:
        """Nothing: layers see to themselves."""

    def after(self, index: int, phase: str) -> None:
        """Nothing."""


def _hook(act: Callable[..., None]) -> Callable[..., None]:
    """Mark what :func:`_there` stands for where a layer is computed without being called."""
    setattr(act, MOVES, True)
    return act


@contextmanager
def _there(group: Group) -> Iterator[None]:
    """Have the weights of a layer here inside, where it is computed without being called."""
    if group.is_here:  # the layer was called, and its hooks see to it
        yield
        return
    _come(group)
    try:
        yield
    finally:
        group.drop()


def _come(group: Group) -> None:
    group.fetch()
    group.wait()
