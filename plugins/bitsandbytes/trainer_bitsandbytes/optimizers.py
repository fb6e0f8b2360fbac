"""Which class and arguments each name stands for. Knows nothing of the trainer.

8bit: the moments of weights of 4096 and more elements are kept in 8 bits, quantised in blocks of 256.
paged: on CUDA the moments lie in memory that the driver moves to the host where the card is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST = 4096
"""Elements of the smallest weight whose moments have 8 bits, unless ``min_8bit_size`` says otherwise."""

SMALLEST_PAGED = 100_000
"""Elements of the smallest weight whose moments bitsandbytes pages."""


@dataclass(frozen=True)
class Kind:
    """A class of bitsandbytes. paged: it differs from ``plain`` in where its moments lie."""

    plain: str
    defaults: dict[str, Any]
    paged: bool = False

    def load(self, *, paged: bool) -> type[torch.optim.Optimizer]:
        """Return the class, the one that pages if ``paged``."""
        from bitsandbytes import optim

        found: type[torch.optim.Optimizer] = getattr(
            optim, f"{'Paged' if paged else ''}{self.plain}"
        )
        return found


_ADAMW = {"betas": (0.9, 0.999), "weight_decay": 1e-2}
_ADEMAMIX = {"betas": (0.9, 0.999, 0.9999), "weight_decay": 1e-2}
_LION = {"betas": (0.9, 0.99), "weight_decay": 0.0}
KINDS = {
    "bnb-adamw": Kind("AdamW", _ADAMW),
    "bnb-adamw-paged": Kind("AdamW", _ADAMW, paged=True),
    "bnb-adamw8bit": Kind("AdamW8bit", _ADAMW),
    "bnb-adamw8bit-paged": Kind("AdamW8bit", _ADAMW, paged=True),
    "bnb-ademamix": Kind("AdEMAMix", _ADEMAMIX),
    "bnb-ademamix8bit": Kind("AdEMAMix8bit", _ADEMAMIX),
    "bnb-ademamix8bit-paged": Kind("AdEMAMix8bit", _ADEMAMIX, paged=True),
    "bnb-lion": Kind("Lion", _LION),
    "bnb-lion-paged": Kind("Lion", _LION, paged=True),
    "bnb-lion8bit": Kind("Lion8bit", _LION),
    "bnb-lion8bit-paged": Kind("Lion8bit", _LION, paged=True),
}
"""Name in settings → class and defaults."""

FIXED = ("optim_bits", "args", "is_paged", "amsgrad")
"""Arguments that the name decides, or that the classes take and ignore."""


BLOCK = 256
"""Elements that share a scale in 8 bits."""


def moments(
    parameter: Tensor, *, kind: Kind, smallest: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor that the optimiser keeps for a weight.

    smallest: elements from which on moments have 8 bits. Tables that all weights share are left out.
    """
    import torch

    size, shape = parameter.numel(), tuple(parameter.shape)
    first = (2, *shape) if kind.plain.startswith("AdEMAMix") else shape
    states = [first] if kind.plain.startswith("Lion") else [first, shape]
    if not kind.plain.endswith("8bit") or size < smallest:
        return [(state, torch.float32) for state in states]
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    for state in states:
        blocks = -(-size // BLOCK)
        scales = (2, blocks) if state != shape else (blocks,)
        found += [(state, torch.uint8), (scales, torch.float32)]
    return found


def page_again(optimizer: Any) -> int:
    """Move restored moments back into paged memory; return how many. None on the CPU."""
    count = 0
    for parameter, state in optimizer.state.items():
        if parameter.device.type == "cpu" or parameter.numel() < SMALLEST_PAGED:
            continue
        for name in ("state1", "state2"):
            if name in state and not getattr(state[name], "is_paged", False):
                paged = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                paged.copy_(state[name].view(paged.shape))
                state[name] = paged
                count += 1
    return count
