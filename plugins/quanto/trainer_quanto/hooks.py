"""What the trainer sees of the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_core.quantising import Quantiser, precisions
from trainer_core.types import PluginInfo
from trainer_quanto.weights import KINDS, quantised

if TYPE_CHECKING:
    from torch import nn


class Quanto(Quantiser):
    """Stores frozen weights of the blocks, and of the text encoder, in 8 bits."""

    info = PluginInfo(
        summary="Frozen weights in 8 bits through optimum-quanto: int8-quanto, fp8-quanto",
        provides=("quantiser",),
        values=precisions(KINDS),
    )
    kinds = KINDS
    library = "optimum-quanto"

    def quantised(self, linear: nn.Linear, *, kind: str) -> nn.Module:
        """Return a layer with the weight of ``linear`` rounded to ``kind``."""
        return quantised(linear, kind=kind)
