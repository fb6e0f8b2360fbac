"""Counts what a computation costs: operators, bytes written, bytes kept, bytes at once.

For tests and benchmarks that must hold on every machine, which a clock does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Work:
    """Operators that were called, views included, and bytes that they wrote.

    A byte is written where an operator's result is no view: a new tensor, or one changed in place. What a
    kernel does inside (such as copies that the CPU makes to cast) is not seen.
    """

    operators: int = 0
    bytes_written: int = 0


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    def __init__(self, work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.work.operators += 1
        if _writes(func):
            self.work.bytes_written += sum(
                t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)
            )
        return out


_UNWRITTEN = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")


def _writes(func: Any) -> bool:
    name: str = func._schema.name
    if name.startswith(_UNWRITTEN):
        return False
    returned = func._schema.returns
    aliases = [r.alias_info for r in returned]
    return not any(a is not None and not a.is_write for a in aliases)


@contextmanager
def counted() -> Iterator[Work]:
    """Count operators and bytes written inside the context; a backward counts too."""
    work = Work()
    with _Counter(work):
        yield work


def kept_bytes(compute: Callable[[], Any], *, besides: Any = ()) -> int:
    """Return the bytes of distinct storages that ``compute()`` saves for its backward.

    besides: tensors (such as parameters) that exist anyway and do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in tree_leaves(besides) if isinstance(t, Tensor)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compute()
    total = sum(size for size, _ in kept.values())
    del out
    return total


@dataclass(frozen=True)
class Memory:
    """Bytes of a computation, beyond those at its start: at most at once, and at its end."""

    peak_bytes: int
    end_bytes: int


def memory_of(compute: Callable[[], Any], *, device: str = "cpu") -> Memory:
    """Return the memory that ``compute()`` takes while its result is held, from the allocator."""
    if device != "cpu":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = compute()
        torch.cuda.synchronize()
        peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del held
        return Memory(peak - start, end - start)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = compute()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    found = seen.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    now = peak = 0
    for _, num_bytes in events:
        now += num_bytes
        peak = max(peak, now)
    del held
    return Memory(peak, now)
