"""Flow matching: noise levels, noised inputs, targets, and the loss term ``flow``.

x_t = (1 - sigma) x0 + sigma eps; the target is the velocity eps - x0; the model sees t = 1000 sigma.
(Lipman et al. 2023, arXiv 2210.02747; logit-normal sigma: Esser et al. 2024, arXiv 2403.03206.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer_core import rng
from trainer_core.hookspecs import hookimpl
from trainer_core.transfer import pinned, sent
from trainer_core.types import (
    Batch,
    Expert,
    LossTerm,
    ModelInputs,
    Moment,
    PluginInfo,
    StepOutput,
)

if TYPE_CHECKING:
    from trainer_core.run import Run
    from trainer_core.settings.core import FlowKeys

MIN_TOKENS, MAX_TOKENS = 256, 4096
MIN_MU, MAX_MU = 0.5, 1.15
TABLE_SIZE = 4097


def auto_shift(spatial_tokens: int) -> float:
    """Return the shift for a frame of so many tokens: exp(mu), mu linear in tokens, clamped.

    The line through (256, 0.5) and (4096, 1.15) is the flow-matching schedulers' own; beyond its ends
    the shift would collapse to pure noise.
    """
    tokens = min(max(spatial_tokens, MIN_TOKENS), MAX_TOKENS)
    slope = (MAX_MU - MIN_MU) / (MAX_TOKENS - MIN_TOKENS)
    return math.exp(MIN_MU + slope * (tokens - MIN_TOKENS))


def shifted(s: Tensor, k: float) -> Tensor:
    """Return s' = k s / (1 + (k - 1) s)."""
    if k == 1:  # the same bits, without four operations
        return s
    return k * s / (1 + (k - 1) * s)


class SigmaSampler:
    """Draws sigma in an expert's range, by the inverse of the chosen distribution's CDF.

    One uniform number a sample decides its sigma, whatever the distribution, shift and range, so runs
    that differ in these compare draw by draw.
    """

    def __init__(self, settings: FlowKeys, experts: tuple[Expert, ...]) -> None:
        self.settings = settings
        self.experts = experts
        self._known_bounds: dict[tuple[Expert, float], tuple[Tensor, Tensor]] = {}
        self._beta_cdf = self._beta_table() if settings.flow_use_beta_schedule else None

    def shift_for(self, spatial_tokens: int) -> float:
        """Return the shift k in force for a frame of so many tokens; 1 is none."""
        if self.settings.flow_schedule_auto_shift:
            return auto_shift(spatial_tokens)
        return self.settings.flow_schedule_shift or 1.0

    def expert(self, seed: int, moment: Moment, shift: float) -> Expert:
        """Draw the expert of a micro-batch by the mass of its range, alike on all ranks."""
        if len(self.experts) == 1:
            return self.experts[0]
        masses = self.masses(shift)
        generator = rng.generator(seed, "flow/expert", moment.step, moment.micro)
        return self.experts[int(torch.multinomial(masses, 1, generator=generator))]

    def masses(self, shift: float) -> Tensor:
        """Return the share of all draws that falls into each expert's range, float64."""
        return torch.stack([hi - lo for lo, hi in (self._bounds(e, shift) for e in self.experts)])

    def draw(self, num: int, *, generator: torch.Generator, expert: Expert, shift: float) -> Tensor:
        """Return sigma (num,) float32 on the CPU, within the expert's range."""
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        low, high = self._bounds(expert, shift)
        sigma = shifted(self._quantile(low + u * (high - low)), shift)
        return sigma.clamp(expert.sigma_min, expert.sigma_max).float()

    def _bounds(self, expert: Expert, shift: float) -> tuple[Tensor, Tensor]:
        """Return the ends of the expert's range as shares of the distribution; there are few."""
        if (expert, shift) not in self._known_bounds:
            self._known_bounds[expert, shift] = self._measured_bounds(expert, shift)
        return self._known_bounds[expert, shift]

    def _measured_bounds(self, expert: Expert, shift: float) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([expert.sigma_min, expert.sigma_max], dtype=torch.float64)
        low, high = self._cdf(shifted(ends, 1 / shift).clamp(0, 1))  # rounding may leave [0, 1]
        return low, high

    def _quantile(self, u: Tensor) -> Tensor:
        if self.settings.flow_use_uniform_schedule:
            return u
        if self._beta_cdf is not None:
            return _interpolate(u, self._beta_cdf, _grid())
        return torch.sigmoid(self.settings.flow_sigmoid_scale * torch.special.ndtri(u))

    def _cdf(self, s: Tensor) -> Tensor:
        if self.settings.flow_use_uniform_schedule:
            return s
        if self._beta_cdf is not None:
            return _interpolate(s, _grid(), self._beta_cdf)
        inside: Tensor = torch.special.ndtr(torch.logit(s) / self.settings.flow_sigmoid_scale)
        return inside

    def _beta_table(self) -> Tensor:
        """Return the Beta CDF on the grid.

        Substituting s = sin^2(pi v / 2) keeps the integrand finite for parameters below 1.
        """
        a = self.settings.flow_beta_schedule_alpha
        b = self.settings.flow_beta_schedule_beta
        v = torch.linspace(0, 1, 16 * (TABLE_SIZE - 1) + 1, dtype=torch.float64)
        middle = (v[1:] + v[:-1]) / 2 * (math.pi / 2)
        mass = torch.sin(middle) ** (2 * a - 1) * torch.cos(middle) ** (2 * b - 1)
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
        s = torch.sin(v * math.pi / 2) ** 2
        return _interpolate(_grid(), s, cdf / cdf[-1])


def _grid() -> Tensor:
    return torch.linspace(0, 1, TABLE_SIZE, dtype=torch.float64)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Return the piecewise linear function through (xs, ys), xs ascending, at x."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, xs.numel() - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0, 1)


def shares_sentence(settings: FlowKeys, experts: tuple[Expert, ...]) -> str | None:
    """Return how often each of several experts is drawn, None for one or where clips decide."""
    if len(experts) == 1 or settings.flow_schedule_auto_shift:
        return None
    masses = SigmaSampler(settings, experts).masses(settings.flow_schedule_shift or 1.0)
    shares = (masses / masses.sum()).tolist()
    parts = [f"{e.role} {share:.1%}" for e, share in zip(experts, shares, strict=True)]
    return f"share of the micro-batches: {', '.join(parts)}; flow_schedule_shift moves it"


def noised(x0: Tensor, eps: Tensor, sigma: Tensor, **other: object) -> ModelInputs:
    """Return the inputs for clean latents, noise and sigma (B,); ``other``: the remaining fields."""
    s = sigma.view(-1, *([1] * (x0.dim() - 1)))
    return ModelInputs(
        x0=x0,
        eps=eps,
        sigma=sigma,
        t=1000 * sigma,
        x_t=(1 - s) * x0 + s * eps,
        target=eps - x0,
        loss_weight=torch.ones_like(sigma),
        **other,  # type: ignore[arg-type]  # the caller names the remaining fields
    )


def draw_inputs(run: Run, batch: Batch, sampler: SigmaSampler, spatial_tokens: int) -> ModelInputs:
    """Return the noised micro-batch of a training step."""
    shift = sampler.shift_for(spatial_tokens)
    expert = sampler.expert(run.seed, batch.moment, shift)
    sigma = sampler.draw(
        batch.latents.shape[0],
        generator=run.generator("flow/sigma", moment=batch.moment),
        expert=expert,
        shift=shift,
    )
    eps = torch.randn(
        batch.latents.shape,
        generator=run.generator("flow/noise", moment=batch.moment, device=run.device),
        device=run.device,
    )
    return noised(
        batch.latents, eps, sent(pinned(sigma, run.device), run.device),
        conditioning=batch.conditioning, role=expert.role, moment=batch.moment,
    )  # fmt: skip


def eval_inputs(run: Run, batch: Batch, *, levels: int) -> list[ModelInputs]:
    """Return the same clip at fixed noise and ``levels`` fixed sigmas in each expert's range.

    Noise depends on the clip's name and the level alone, so the values of two runs, or of a base model
    and its adapter, are comparable. Sigmas are the middles of equal parts of the range.
    """
    inputs = []
    for expert in run.spec.experts:
        for level in range(levels):
            ratio = (level + 0.5) / levels
            value = expert.sigma_min + (expert.sigma_max - expert.sigma_min) * ratio
            purpose = ("eval/noise", batch.dataset, *batch.sample_ids, expert.role, level)
            generator = rng.generator(run.seed, *purpose)  # type: ignore[arg-type]
            eps = torch.randn(batch.latents.shape, generator=generator).to(run.device)
            sigma = torch.full((batch.latents.shape[0],), value, device=run.device)
            made = noised(
                batch.latents, eps, sigma,
                conditioning=batch.conditioning, role=expert.role, moment=batch.moment,
            )  # fmt: skip
            inputs.append(replace(made, training=False))
    return inputs


def squared_error(prediction: Tensor, inputs: ModelInputs) -> Tensor:
    """Return the weighted mean squared error (B,) float32."""
    error = (prediction.float() - inputs.target.float()).square().flatten(1).mean(1)
    return error * inputs.loss_weight


class Flow:
    """Core's own plugin ``flow``: the mean squared error of the velocity."""

    info = PluginInfo(summary="Flow-matching loss: mean squared error of the velocity")
    name = "flow"

    @hookimpl
    def compute_loss(self, output: StepOutput) -> LossTerm:
        """Return the term ``flow``."""
        return LossTerm("flow", squared_error(output.prediction, output.inputs))
