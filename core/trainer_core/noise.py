"""Keeps libraries quiet that speak when they are imported."""

from __future__ import annotations

import logging

NOISY = (
    "torchao",
    "torch.utils._pytree",
    "bitsandbytes",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
"""They tell, whenever they are installed, of kernels that they did not find and nothing here uses."""


def quiet_libraries() -> None:
    """Let those libraries tell of errors only."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
