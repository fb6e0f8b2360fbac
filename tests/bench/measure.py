"""What several benchmarks share: adapters, a bootstrap interval, facts of the machine, its peak."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer_lora.fused import take_over

LORA_RANK = 16
ADAPTER = "default"
DRAWS = 10_000


def adapt(blocks: nn.ModuleList) -> None:
    """Put peft's adapters on q, k, v and out of both attentions; freeze the rest."""
    blocks.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets)
    inject_adapter_in_model(config, blocks, ADAPTER)


def fuse(blocks: nn.ModuleList) -> None:
    """Give the adapters of :func:`adapt` the forward that they have in our runs."""
    for layer in blocks.modules():
        if isinstance(layer, LoraLayer):
            take_over(layer, ADAPTER)


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
