"""Ends the alignment when the averaged similarity reaches a threshold. Its numbers stay on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Cutoff:
    """threshold: None for never. decay: share of the average that an update keeps; the first value
    begins it. recovers: on again below the threshold; otherwise the first crossing is the last.
    """

    def __init__(self, *, threshold: float | None, decay: float, recovers: bool) -> None:
        self.threshold, self.decay, self.recovers = threshold, decay, recovers
        self.average: Tensor | None = None
        self.crossed: Tensor | None = None

    def update(self, similarity: Tensor) -> Tensor:
        """Take a similarity (0-d) in and return the factor of the weight (0-d): 1, or 0 where it is
        off.
        """
        import torch

        similarity = similarity.detach()
        if self.average is None:
            self.average = similarity.clone()
        else:
            self.average = self.decay * self.average + (1 - self.decay) * similarity
        if self.threshold is None:
            return torch.ones_like(similarity)
        crosses = (self.average >= self.threshold).float()
        if self.crossed is not None and not self.recovers:
            crosses = torch.maximum(crosses, self.crossed)
        self.crossed = crosses
        return 1 - crosses

    def is_final(self) -> bool:
        """Whether it is off for good. The host waits for the device where there is a threshold."""
        if self.threshold is None or self.recovers or self.crossed is None:
            return False
        return bool(self.crossed.item())  # host sync

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the average and whether it has crossed; nothing before the first update."""
        found = {"average": self.average, "crossed": self.crossed}
        return {name: value.cpu() for name, value in found.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Tensor], *, device: torch.device) -> None:
        """Go on from a state, on the device where similarities come from."""
        moved = {name: value.to(device) for name, value in state.items()}
        self.average, self.crossed = moved.get("average"), moved.get("crossed")
