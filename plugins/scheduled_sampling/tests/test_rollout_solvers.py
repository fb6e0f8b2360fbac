"""Solvers against closed forms: constant, linear and Gaussian flows, and diffusers' own UniPC."""

from __future__ import annotations

import math

import pytest
import torch

from trainer_scheduled_sampling.solvers import STAGES, integrate

SOLVERS = [("euler", 1), ("heun", 2), ("rk4", 4), ("unipc", 1), ("unipc", 2)]
"""(solver, order of its error)"""


def named(solver: str, order: int) -> dict:
    return {"solver": solver, "order": order if solver == "unipc" else 2}


def fall(source: float, target: float, steps: int, num: int = 1) -> torch.Tensor:
    return torch.linspace(source, target, steps + 1, dtype=torch.float64)[:, None].repeat(1, num)


def slope(errors: list[float]) -> float:
    """Observed order from errors at 16, 32 and 64 steps."""
    return math.log2(errors[0] / errors[-1]) / 2


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_a_constant_velocity_is_followed_exactly(solver, order):
    """O-R2: with v = eps - x0 every path ends on the flow's own x_t."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 3, 5, 5, generator=draw) for _ in range(2))
    sigmas = torch.stack([torch.linspace(0.9, 0.37, 11), torch.linspace(0.6, 0.05, 11)], dim=1)

    def on_path(sigma):
        s = sigma.view(-1, 1, 1, 1, 1)
        return (1 - s) * x0 + s * eps

    found = integrate(lambda x, s: eps - x0, on_path(sigmas[0]), sigmas, **named(solver, order))
    torch.testing.assert_close(found, on_path(sigmas[-1]), atol=5e-6, rtol=0)


def test_the_reference_numbers_of_one_rollout():
    """x0 = 0, eps = 1, four levels, source 3 of 3, velocity .1: 1 - 2/3 * .1."""
    sigmas = torch.tensor([[1.0], [2 / 3], [1 / 3]])
    found = integrate(
        lambda x, s: torch.full_like(x, 0.1), torch.ones(1, 1), sigmas, solver="euler"
    )
    assert abs(float(found) - 0.933333) < 1e-6


def test_euler_on_a_linear_model_is_a_product():
    """O-R4: v = a x gives prod(1 + a dsigma)."""
    a, sigmas = 1.7, fall(0.8, 0.3, 5)
    found = integrate(lambda x, s: a * x, torch.ones(1, 1).double(), sigmas, solver="euler")
    assert float(found) == pytest.approx(math.prod([1 + a * -0.1] * 5), rel=1e-12)


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_the_error_falls_with_the_solver_s_order(solver, order):
    """O-R5: the exact flow of Gaussian data N(mu, s^2), which is far from linear in sigma."""
    mu, s = 0.7, 0.4

    def moments(sigma):
        return (1 - sigma) * mu, (1 - sigma) ** 2 * s**2 + sigma**2

    def velocity(x, sigma):
        sigma = sigma.view(-1, 1)
        m, v = moments(sigma)
        return sigma * (x - m) / v - (mu + (1 - sigma) * s**2 * (x - m) / v)

    x = torch.tensor([[1.3]], dtype=torch.float64)
    (m0, v0), (m1, v1) = moments(0.8), moments(0.3)
    exact = m1 + math.sqrt(v1 / v0) * (float(x) - m0)
    errors = [
        abs(float(integrate(velocity, x, fall(0.8, 0.3, n), **named(solver, order))) - exact)
        for n in (16, 32, 64)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert slope(errors) > order - 0.15, errors
    if solver == "rk4":
        assert errors[0] < 5e-7


@pytest.mark.parametrize("order", [1, 2])
def test_unipc_is_that_of_diffusers(order):
    """The same levels and the same model give the samples of UniPCMultistepScheduler."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        solver_order=order, lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas[:9].double()

    def velocity(x, sigma):
        return torch.sin(3 * x) + sigma.view(-1, 1) * x

    start = torch.randn(1, 6, generator=torch.Generator().manual_seed(3)).double()
    x = start
    for number in range(8):
        v = velocity(x, sigmas[number].view(1))
        x = scheduler.step(v, scheduler.timesteps[number], x).prev_sample
    found = integrate(velocity, start, sigmas[:, None], solver="unipc", order=order)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_a_sample_that_waits_ends_as_if_it_were_alone(solver, order):
    def velocity(x, sigma):
        return torch.sin(x) * (1 + sigma.view(-1, 1))

    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    long, short = fall(0.9, 0.4, 5), fall(0.7, 0.5, 2)
    waits = torch.cat([short[:1].expand(3, 1), short])
    stays = torch.full_like(long, 0.3)
    together = integrate(
        velocity, start, torch.cat([long, waits, stays], 1), **named(solver, order)
    )
    for row, alone in ((0, long), (1, short)):
        expected = integrate(velocity, start[row : row + 1], alone, **named(solver, order))
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-12, rtol=0)
    assert torch.equal(together[2], start[2])


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_from_pure_noise_nothing_is_lost(solver, order):
    """At sigma 1 there is no signal and log(alpha / sigma) is infinite."""
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    sigmas = fall(1.0, 0.25, 3).float()
    found = integrate(lambda x, s: eps - x0, eps, sigmas, **named(solver, order))
    torch.testing.assert_close(found, 0.75 * x0 + 0.25 * eps)


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_so_many_predictions_of_the_whole_batch(solver, order):
    """O-R6, and O-R8: levels never rise, and only levels of the path are asked for."""
    asked = []

    def velocity(x, sigma):
        asked.append(sigma.clone())
        return torch.zeros_like(x) + 0.1 * x

    sigmas = torch.cat([fall(0.9, 0.4, 4), torch.full((5, 1), 0.2).double()], dim=1)
    integrate(velocity, torch.ones(2, 3).double(), sigmas, **named(solver, order))
    assert len(asked) == 4 * STAGES[solver]
    assert all(sigma.shape == (2,) for sigma in asked)
    levels = torch.stack(asked)
    assert (levels[1:] <= levels[:-1]).all()
    assert levels.max() <= 0.9
    assert levels.min() >= 0.2
