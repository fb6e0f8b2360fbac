"""Where this process runs: device, dtype, rank. The only module that asks for the world size."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from trainer_core.errors import ConfigError, Problem
from trainer_core.optim import trained_dtype
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Placement

_STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def world() -> tuple[int, int]:
    """Return (rank, number of processes); more than one process is refused."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        text = "several processes are not built yet."
        way_out = "Start a single process, without torchrun or accelerate launch."
        raise ConfigError([Problem("WORLD_SIZE", text, size, "environment", way_out)])
    return 0, 1


def placement(settings: CoreSettings) -> Placement:
    """Return where the weights go, and in which dtypes."""
    device = _device(settings.device)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    trained = trained_dtype(
        settings.optimizer,
        model_type=settings.model_type,
        mixed_precision=settings.mixed_precision,
    )
    stored = None
    if settings.base_model_precision != "no_change" and settings.base_model_default_dtype:
        stored = _STORED[settings.base_model_default_dtype]
    if stored == torch.bfloat16 and dtype == torch.float32:
        text = "needs mixed_precision bf16: with no, products are in float32."
        way_out = "Set mixed_precision to bf16, or remove the key."
        raise ConfigError([Problem("base_model_default_dtype", text, "bf16", way_out=way_out)])
    return Placement(device=device, dtype=dtype, trained_dtype=trained, stored_dtype=stored)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        mps = torch.backends.mps.is_available()
        return torch.device("mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        way_out = 'Leave it at "auto", or name a device that torch finds here.'
        text = f"cannot be used: {str(error).splitlines()[0]}."
        raise ConfigError([Problem("device", text, name, way_out=way_out)]) from error
    return device


def begin_peak(device: torch.device) -> int:
    """Return the memory that is taken now, and let :func:`peak_bytes` forget what was taken before.

    Where the system cannot forget (not Linux), the peak so far is returned.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: the allocator's on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    try:  # of this process alone: what getrusage tells, a process inherits
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
