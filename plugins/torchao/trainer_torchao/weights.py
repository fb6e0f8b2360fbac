"""Weight-only quantisation by torchao: w ~ scale * q, one scale for each output row.

Knows nothing of the trainer. q is int8 or float8 (e4m3); the same weight gives the same bits every time.
Only weights are rounded. Rounding inputs as well would need no more memory and pass no gradient on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

KINDS = ("int8-torchao", "fp8-torchao")
"""The precisions, as settings name them."""

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell of other things while the library is imported."""


def quantised(linear: nn.Linear, *, kind: str) -> nn.Module:
    """Return ``linear`` with its weight rounded to ``kind``, in place, where it lies."""
    load()
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8-torchao" else Float8WeightOnlyConfig()
    quantize_(linear, config)
    return linear


def load() -> None:
    """Import the library without its notes on kernels that are not there and that nothing here uses."""
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import torchao.quantization  # noqa: F401  # the import is what is wanted
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
