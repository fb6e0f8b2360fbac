"""Weight-only quantisation by optimum-quanto: w ~ scale * q, one scale for each output row.

Knows nothing of the trainer. q is int8 or float8 (e4m3), rounded to the nearest, the scale the row's
largest magnitude over that of q: the same weight gives the same bits every time. A product first
restores the weight in the dtype of the scale, so gradients of inputs are those of the rounded weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

KINDS = ("int8-quanto", "fp8-quanto")
"""The precisions, as settings name them."""


def quantised(linear: nn.Linear, *, kind: str) -> nn.Module:
    """Return a layer that computes what ``linear`` does with its weight rounded to ``kind``.

    It lies where ``linear`` lies; its output has the dtype that the weight had.
    """
    from optimum.quanto import QLinear, qfloat8_e4m3fn, qint8

    layer = QLinear.from_module(linear, weights=qint8 if kind == "int8-quanto" else qfloat8_e4m3fn)
    layer.freeze()
    made: nn.Module = layer
    return made
