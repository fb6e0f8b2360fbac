"""An exponential moving average of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_core.errors import CheckpointError


class Ema:
    """The average and its update.

    decay: share that an update keeps; the first updates keep (1 + n) / (10 + n), n the updates so far,
    so that the start is forgotten. interval: optimiser steps between updates; the decay is per update.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, decay: float, interval: int
    ) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.interval = interval
        self.num_updates = 0
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step``; parameters without gradient stay out."""
        if step % self.interval:
            return
        keep = min((1 + self.num_updates) / (10 + self.num_updates), self.decay)
        self.num_updates += 1
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        live = [self.parameters[name].detach().float() for name in names]
        torch._foreach_lerp_([self.shadow[name] for name in names], live, 1 - keep)

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the model for the time of the block."""
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.copy_(self.shadow[name])
            yield
        finally:
            for name, p in self.parameters.items():
                p.copy_(live[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name and the number of updates."""
        return {**self.shadow, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave."""
        missing = [name for name in (*self.shadow, "num_updates") if name not in state]
        if missing:
            raise CheckpointError(
                f"the averaged weights of the checkpoint lack {missing[0]!r} and "
                f"{len(missing) - 1} more; it belongs to another model or adapter"
            )
        self.num_updates = int(state["num_updates"])
        for name, value in self.shadow.items():
            value.copy_(state[name])
