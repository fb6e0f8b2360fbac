"""Host memory to the accelerator, without making the host wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in pinned memory if ``device`` is a GPU that copies from it on its own."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``. From pinned memory the host does not wait for the copy.

    The allocator of pinned memory gives nothing out again before the copies from it are done.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
