"""Which samples are rolled out, from where, and what they are trained to predict. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer_scheduled_sampling.words import Shape, Strategy

MIN_SIGMA = 1e-3
"""The endpoint target divides by sigma, at least by this."""


def ramp(step: int, *, first: float, last: float, start: int, length: int, shape: Shape) -> float:
    """Return the probability at an optimiser step: ``first`` up to ``start``, ``last`` from its end
    on.
    """
    share = min(max((step - start) / length, 0.0), 1.0) if length else float(step >= start)
    if shape == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return first + (last - first) * share


def draw_counts(
    num: int, *, probability: float, most: int, strategy: Strategy, generator: torch.Generator
) -> Tensor:
    """Return the steps (num,) int64 that each sample is rolled out: 0 with 1 - probability, else 1 to
    most.

    uniform: all alike. biased_early: 1 + round(u^2 (most - 1)), mean 1 + (most - 1) / 3, short rollouts
    more often. biased_late: the mirror image, long ones more often.
    """
    rolls = torch.rand(num, generator=generator, dtype=torch.float64) < probability
    u = torch.rand(num, generator=generator, dtype=torch.float64)
    if strategy == "uniform":
        counts = 1 + (u * most).floor().clamp(max=most - 1)
    elif strategy == "biased_early":
        counts = 1 + (u.square() * (most - 1)).round()
    else:
        counts = 1 + ((1 - u.square()) * (most - 1)).round()
    return torch.where(rolls, counts, torch.zeros_like(counts)).long()


def place(sigma: Tensor, grid: Tensor) -> Tensor:
    """Return the place (B,) float64 of each level on a falling grid, between its points: 2.5 is half-way.

    A level above the first point has place 0.
    """
    levels, points = sigma.double(), grid.double()
    right = torch.searchsorted(-points, -levels).clamp(1, len(points) - 1)
    above, below = points[right - 1], points[right]
    part = ((above - levels) / (above - below)).clamp(0, 1)
    return right - 1 + part


def at(places: Tensor, grid: Tensor) -> Tensor:
    """Return the levels at places on the grid; the inverse of :func:`place`."""
    points = grid.double()
    left = places.floor().long().clamp(0, len(points) - 2)
    return points[left] + (points[left + 1] - points[left]) * (places - left)


def paths(
    sigma: Tensor, counts: Tensor, grid: Tensor, *, steps: int | None = None, highest: float = 1.0
) -> Tensor:
    """Return the levels (J + 1, B) float32 from each sample's source down to its own sigma, the last row.

    sigma: (B,), the target. counts: (B,) wanted steps; a sample near the noisy end has fewer, since its
    source must lie on the grid and not above ``highest``, the noisiest level that the network knows.
    Steps are those of the grid, moved so that they end at sigma exactly. steps: J; by default the most
    that a sample takes.
    """
    where = place(sigma, grid)
    room = (where - place(torch.tensor([highest]), grid)).clamp(min=0)
    counts = torch.minimum(counts, room.floor().long())
    rows = int(counts.max()) if steps is None else steps
    left = torch.arange(rows, -1, -1).unsqueeze(1)  # steps still to go, (J + 1, 1)
    levels = at(where - torch.minimum(left, counts), grid).float()
    levels[-1] = sigma
    # a sample that is not rolled out, or waits at its source, repeats a level exactly
    return torch.where(counts == 0, sigma.expand_as(levels), levels)


def endpoint_target(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity (B, ...) that leads from x at sigma (B,) straight to x0: (x - x0) / sigma."""
    return (x - x0) / sigma.clamp_min(MIN_SIGMA).view(-1, *(1,) * (x.ndim - 1))


def drift(x: Tensor, on_path: Tensor) -> Tensor:
    """Return how far x lies from where it would be on the path: |x - x_t| / |x_t|, (B,)."""
    return (x - on_path).flatten(1).norm(dim=1) / on_path.flatten(1).norm(dim=1).clamp_min(1e-12)


def towards_data(prediction: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Return 2 (1 - cos), (B,): how much the predicted velocity points away from the way back to x0.

    It is | v/|v| - d/|d| |^2 with d = x - x0 (the anti-drift term of ReflexFlow), blind to the size of v.
    """
    v, d = prediction.float().flatten(1), (x - x0).flatten(1)
    return 2 * (1 - torch.nn.functional.cosine_similarity(v, d, dim=1))


def most_of(tables: Sequence[Tensor]) -> int:
    """Return the largest number in some tables of counts."""
    return max(int(table.max()) for table in tables)


def expected_most(
    cdf: Callable[[int], float], *, most: int, num_samples: int, probability: float
) -> float:
    """Return the mean of the largest count of a micro-batch; ``cdf(m)``: share of counts up to m."""
    return sum(1 - (1 - probability + probability * cdf(m)) ** num_samples for m in range(most))


def share_up_to(m: int, *, most: int, strategy: Strategy) -> float:
    """Return the probability that a rolled-out sample takes at most m steps."""
    if m <= 0:
        return 0.0
    if m >= most:
        return 1.0
    if strategy == "uniform":
        return m / most
    edge = (m - 0.5) / (most - 1)  # 1 + round(y (most - 1)) <= m below it
    return math.sqrt(edge) if strategy == "biased_early" else 1 - math.sqrt(1 - edge)
