"""Copies from host to device. Weights are frozen, so nothing is ever copied back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Transfers(Protocol):
    """Where weights go when they compute, and what stands in for them when they do not."""

    def home(self, leaf: Tensor) -> Tensor:
        """Return a weight as it lies at home; called once for each."""
        ...

    def away(self, leaf: Tensor) -> Tensor:
        """Return what stands in the module's place while the weight is not on the device."""
        ...

    def fetch(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start to copy to the device; return the copies, and a ticket to wait for them with."""
        ...

    def wait(self, ticket: Any) -> None:
        """Let what is computed from now on see the copies."""
        ...

    def drop(self, copies: Sequence[Tensor]) -> None:
        """The copies are not needed any more by what is computed from now on."""
        ...


class CudaTransfers:
    """Pinned memory to a CUDA device, on a stream of its own or on the current one.

    Copies are allocated on the current stream, and the copying stream first waits for all that was
    queued there: memory that a dropped group has just given back may be written to only when the
    kernels that read that group are done. So the copy of the next group runs while this one computes.
    """

    def __init__(self, device: torch.device, *, stream: bool) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if stream else None

    def home(self, leaf: Tensor) -> Tensor:
        """Return the weight in pinned host memory."""
        return leaf.detach().cpu().contiguous().pin_memory()

    def away(self, leaf: Tensor) -> Tensor:
        """Return the weight at home: a product with it fails, for its device is another one."""
        return leaf

    def fetch(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Queue the copies; nothing waits."""
        current = torch.cuda.current_stream(self.device)
        stream = self.stream or current
        copies = [torch.empty_like(home, device=self.device) for home in homes]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for copy, home in zip(copies, homes, strict=True):
                copy.copy_(home, non_blocking=True)
            return copies, stream.record_event()

    def wait(self, ticket: Any) -> None:
        """Let the current stream wait for the copies, the host not."""
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def drop(self, copies: Sequence[Tensor]) -> None:
        """Nothing to do: the allocator orders what reuses the memory behind what was queued."""
