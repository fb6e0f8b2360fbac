"""What several benchmarks share: adapters, a bootstrap interval, facts of the machine, its peak."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

LORA_RANK = 16
DRAWS = 10_000


class Lora(nn.Module):
    """A frozen linear layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output and the adapter's."""
        return self.base(x) + self.up(self.down(x))


def adapt(blocks: Iterable[Any]) -> None:
    """Put adapters on q, k, v and out of both attentions; all else is frozen."""
    for block in blocks:
        block.requires_grad_(False)
        for attention in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, Lora(getattr(attention, name)))
            attention.to_out[0] = Lora(attention.to_out[0])


def interval(values: list[float], of: Callable[[list[float]], float]) -> tuple[float, float]:
    """Return the bootstrap interval (95 %) of a statistic."""
    source = random.Random(0)
    draws = sorted(of(source.choices(values, k=len(values))) for _ in range(DRAWS))
    return draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS)]


def machine(device: str) -> dict[str, Any]:
    """Return what a reader of figures must know about where they are of."""
    name = platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": name,
    }


def seconds(compute: Callable[[], Any], device: str) -> float:
    """Return how long ``compute()`` takes; on a GPU by events, what is queued included."""
    if device == "cpu":
        start = time.perf_counter()
        compute()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    compute()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Return the operations a second of the best of a few large products, 2 a multiply and add."""
    size = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / best
