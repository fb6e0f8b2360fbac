"""Solvers of dx/dsigma = v(x, sigma) along a path of noise levels that each sample has for itself.

Levels fall from the source to the target. A sample that takes fewer steps than the others waits at its
source: its level repeats, and nothing about it changes. Flow convention: x = (1 - sigma) x0 + sigma
eps, so that x0 = x - sigma v and the model's time is 1000 sigma.

UniPC (Zhao et al. 2023, arXiv 2302.04867) with data prediction and B(h) = expm1(-h), its multistep
form; it corrects a step with the prediction that the next step needs anyway, so that a step costs one
prediction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_scheduled_sampling.words import Solver

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``velocity(x, sigma)``: x (B, ...), sigma (B,) → v (B, ...)."""

STAGES: dict[Solver, int] = {"euler": 1, "heun": 2, "rk4": 4, "unipc": 1}
"""Predictions that one step takes."""


def integrate(
    velocity: Velocity, x: Tensor, sigmas: Tensor, *, solver: Solver, order: int = 2
) -> Tensor:
    """Return x (B, ...) at the last level.

    x: at the first level. sigmas: (J + 1, B), each column falling, with repeats at its start where a
    sample waits. order: of UniPC, 1 or 2. Takes ``STAGES[solver] * J`` predictions of the whole batch.
    """
    if solver == "unipc":
        return _unipc(velocity, x, sigmas, order)
    step = {"euler": _euler, "heun": _heun, "rk4": _rk4}[solver]
    for here, there in itertools.pairwise(sigmas):
        moved = step(velocity, x, here, there)
        x = torch.where(_like(here > there, x), moved, x)
    return x


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Return (B,) as (B, 1, ..., 1)."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def _euler(velocity: Velocity, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
    return x + _like(there - here, x) * velocity(x, here)


def _heun(velocity: Velocity, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
    d = _like(there - here, x)
    first = velocity(x, here)
    second = velocity(x + d * first, there)
    return x + d * (first + second) / 2


def _rk4(velocity: Velocity, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
    d, middle = _like(there - here, x), (here + there) / 2
    k1 = velocity(x, here)
    k2 = velocity(x + d / 2 * k1, middle)
    k3 = velocity(x + d / 2 * k2, middle)
    k4 = velocity(x + d * k3, there)
    return x + d * (k1 + 2 * k2 + 2 * k3 + k4) / 6


# --- UniPC ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Past:
    """A step that was made: from (sample, x0, level) towards ``there``, with the x0 of the step
    before.
    """

    sample: Tensor
    x0: Tensor
    here: Tensor
    there: Tensor
    x0_before: Tensor
    before: Tensor
    moved: Tensor
    """(B,) bool: the sample moved in it."""
    had_before: Tensor
    """(B,) bool: there was a step before it for the sample."""


def _half_log_snr(sigma: Tensor) -> Tensor:
    """Return log(alpha / sigma), in float64."""
    return torch.log1p(-sigma.double()) - torch.log(sigma.double())


def _unipc(velocity: Velocity, x: Tensor, sigmas: Tensor, order: int) -> Tensor:
    past: _Past | None = None
    for here, there in itertools.pairwise(sigmas):
        x0 = x - _like(here, x) * velocity(x, here)
        if past is not None:
            x = _corrected(x, x0, past, order)
        nothing = torch.zeros_like(here, dtype=torch.bool)
        had = nothing if past is None else past.moved
        made = _Past(
            sample=x, x0=x0, here=here, there=there,
            x0_before=x0 if past is None else past.x0, before=here if past is None else past.here,
            moved=here > there, had_before=had if order > 1 else nothing,
        )  # fmt: skip
        x = torch.where(_like(made.moved, x), _predicted(made), x)
        past = made
    return x


@dataclass(frozen=True)
class _Step:
    """The coefficients (B,) of a step in float64; r is the last step's length over this one's,
    negative.
    """

    keep: Tensor
    """Of the sample: sigma_there / sigma_here."""
    pull: Tensor
    """Of x0: alpha_there - keep alpha_here, finite where the source has no signal at all."""
    bend: Tensor
    """Of differences of x0: alpha_there B(h)."""
    h: Tensor
    r: Tensor


def _step(past: _Past) -> _Step:
    here, there = past.here.double(), past.there.double()
    keep = there / here
    h = _half_log_snr(past.there) - _half_log_snr(past.here)
    r = (_half_log_snr(past.before) - _half_log_snr(past.here)) / h
    pull = (1 - there) - keep * (1 - here)
    return _Step(keep, pull, (1 - there) * torch.expm1(-h), h, r)


def _predicted(past: _Past) -> Tensor:
    """Return the sample at ``there``: UniP of order 2 where a step came before, else of order 1."""
    step, x = _step(past), past.sample
    moved = _weighted(x, (step.keep, past.sample), (step.pull, past.x0))
    slope = torch.where(past.had_before, -0.5 * step.bend / step.r, torch.zeros_like(step.r))
    return moved + _weighted(x, (slope, past.x0_before - past.x0))


def _corrected(x: Tensor, x0: Tensor, past: _Past, order: int) -> Tensor:
    """Return the sample at ``past.there``, made anew now that its x0 is known: UniC."""
    step = _step(past)
    base = _weighted(x, (step.keep, past.sample), (step.pull, past.x0))
    # Order 1 takes half of the new difference. Order 2 solves [[1, 1], [r, 1]] c = [b1, b2], where
    # b_n = n! phi_(n+1)(-h) (-h)^... / B(h), so that the error is of the third order in h.
    hh = -step.h
    first = (torch.expm1(hh) / hh - 1) / torch.expm1(hh)
    second = 2 * ((torch.expm1(hh) / hh - 1) / hh - 0.5) / torch.expm1(hh)
    old = (first - second) / (1 - step.r)
    old = torch.where(past.had_before, old, torch.zeros_like(old))
    new = torch.where(past.had_before, first - old, torch.full_like(old, 0.5))
    old_slope = torch.where(past.had_before, -step.bend * old / step.r, torch.zeros_like(old))
    fixed = base + _weighted(
        x, (-step.bend * new, x0 - past.x0), (old_slope, past.x0_before - past.x0)
    )
    can = past.moved & torch.isfinite(step.h)
    return torch.where(_like(can, x), fixed, x)


def _weighted(x: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of coefficient (B,) times value (B, ...), in the dtype of ``x``."""
    return sum((_like(c.to(x.dtype), x) * value for c, value in parts), torch.zeros_like(x))
