"""Weighs tensors while code runs: how many bytes live at once, and how many operations are done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SEGMENT = 512
"""CUDA's allocator rounds every tensor up to that many bytes."""


def num_bytes(values: Iterable[Tensor]) -> int:
    """Return the bytes that the storages behind some tensors take, each counted once."""
    storages = (value.untyped_storage() for value in values)
    return sum({id(storage): taken(storage) for storage in storages}.values())


def taken(storage: Any) -> int:
    """Return the bytes that an allocator gives to a storage."""
    return -(-int(storage.nbytes()) // SEGMENT) * SEGMENT


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [v for m in modules for v in (*m.parameters(), *m.buffers())]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of every storage that an operation makes, until it is freed.

    live, peak: bytes now, and at most since :meth:`restart`. What was there before it was entered counts
    from the moment of :meth:`know`. Workspace inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def know(self, values: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for value in values:
            self._add(value.untyped_storage())

    def restart(self) -> None:
        """Begin a new peak at what lives now."""
        self.peak = self.live

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = taken(storage)

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts floating-point operations of products and attention: 2 for each multiply and add."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it did."""
        out = func(*args, **(kwargs or {}))
        count = COUNTS.get(func.overloadpacket)
        if count is not None:
            self.total += count(out, *args)
        return out


def _product(out: Any, a: Tensor, b: Tensor, *_: Any) -> int:
    return 2 * int(out.numel()) * a.shape[-1]


def _added_product(out: Any, bias: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    return 2 * int(out.numel()) * a.shape[-1]


def _convolution(out: Any, x: Tensor, weight: Tensor, *rest: Any) -> int:
    return 2 * int(out.numel()) * weight[0].numel()


def _convolution_backward(out: Any, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    wanted = sum(value is not None for value in out[:2])
    return 2 * wanted * grad.numel() * weight[0].numel()


def _attention(out: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


def _attention_backward(out: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return 5 * _attention(out, q, k, v) // 2  # the scores once more, then four products


aten = torch.ops.aten
COUNTS: dict[Any, Callable[..., int]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _added_product,
    aten.baddbmm: _added_product,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
