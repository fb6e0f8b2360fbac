"""What a plugin tells ``trainer plan`` of the work beside training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Occasion:
    """Something that a run does beside training, for ``trainer plan`` to weigh.

    name: of the phase. act: does it once, over tensors without contents. modules: networks that are on
    the device for it, beside the model. aside: whether the model waits in host memory meanwhile.
    """

    name: str
    act: Callable[[], Any]
    modules: tuple[nn.Module, ...] = ()
    aside: bool = False
