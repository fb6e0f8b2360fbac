"""Weight-only quantisation by torchao: w ~ scale * q, one scale for each output row.

Knows nothing of the trainer. q is int8 or float8 (e4m3); the same weight gives the same bits every time.
Only weights are rounded. Rounding inputs as well would need no more memory and pass no gradient on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

KINDS = ("int8-torchao", "fp8-torchao")
"""The precisions, as settings name them."""


def quantised(linear: nn.Linear, *, kind: str) -> nn.Module:
    """Return ``linear`` with its weight rounded to ``kind``, in place, where it lies."""
    with _quiet():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8-torchao" else Float8WeightOnlyConfig()
    quantize_(linear, config)
    return linear


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from telling that kernels which nothing here uses are not there."""
    logger = logging.getLogger("torchao")
    before, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.level = before


def version() -> str:
    """Return the library's version, which takes part in what a quantised encoder is known by."""
    from importlib import metadata

    return metadata.version("torchao")
