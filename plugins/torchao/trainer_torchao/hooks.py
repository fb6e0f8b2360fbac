"""What the trainer sees of the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_core.quantising import Quantiser, precisions
from trainer_core.types import PluginInfo
from trainer_torchao.weights import KINDS, load, quantised

if TYPE_CHECKING:
    from torch import nn

    from trainer_core.run import Run


class TorchAO(Quantiser):
    """Stores frozen weights of the blocks, and of the text encoder, in 8 bits."""

    info = PluginInfo(
        summary="Frozen weights in 8 bits through torchao: int8-torchao, fp8-torchao",
        provides=("quantiser",),
        values=precisions(KINDS),
    )
    kinds = KINDS
    library = "torchao"

    def check(self, run: Run) -> None:
        """Refuse what cannot be quantised; offer the text encoder what its key asks for."""
        super().check(run)
        load()  # before diffusers does, with all that the library has to say

    def quantised(self, linear: nn.Linear, *, kind: str) -> nn.Module:
        """Return a layer with the weight of ``linear`` rounded to ``kind``."""
        return quantised(linear, kind=kind)
