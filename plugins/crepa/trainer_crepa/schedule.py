"""The weight of the alignment over steps. Plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Course = Literal["constant", "linear", "cosine", "polynomial"]


@dataclass(frozen=True)
class Schedule:
    """weight: after the warm-up. end: at the end of a decay. warm_up, decay_end, cutoff: steps, all
    counted from the start of training; cutoff 0 is never.
    """

    weight: float
    end: float = 0.0
    course: Course = "constant"
    warm_up: int = 0
    decay_end: int = 0
    power: float = 1.0
    cutoff: int = 0

    def at(self, step: int) -> float:
        """Return the weight when ``step`` steps are done: 0 at step 0 of a warm-up."""
        if self.is_over(step):
            return 0.0
        if step < self.warm_up:
            return self.weight * step / self.warm_up
        if self.course == "constant":
            return self.weight
        share = (step - self.warm_up) / max(self.decay_end - self.warm_up, 1)
        left = 1 - min(share, 1.0)
        if self.course == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        elif self.course == "polynomial":
            left = left**self.power
        return self.end + (self.weight - self.end) * left

    def is_over(self, step: int) -> bool:
        """Whether the cutoff has come."""
        return 0 < self.cutoff <= step
