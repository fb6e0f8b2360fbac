"""The words that settings and mathematics share."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["uniform", "biased_early", "biased_late"]
Shape = Literal["linear", "cosine"]
Solver = Literal["euler", "heun", "rk4", "unipc"]
