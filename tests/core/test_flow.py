"""Flow matching against closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from trainer_core.flow import SigmaSampler, auto_shift, noised, shares_sentence, shifted
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Expert, Moment

FULL = Expert("transformer")


def draw(num: int = 20_000, expert: Expert = FULL, shift: float = 1.0, **keys: object):
    sampler = SigmaSampler(CoreSettings(**keys), (expert,))
    generator = torch.Generator().manual_seed(0)
    return sampler.draw(num, generator=generator, expert=expert, shift=shift)


def ks_distance(sample: torch.Tensor, cdf) -> float:
    ordered = sample.double().sort().values
    expected = torch.tensor([cdf(float(x)) for x in ordered])
    ranks = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float((expected - ranks).abs().max())


def logit_normal_cdf(x: float) -> float:
    return NormalDist().cdf(math.log(x / (1 - x)))


def test_default_is_logit_normal():
    assert ks_distance(draw(), logit_normal_cdf) < 0.015


def test_shift_moves_the_quantiles_by_the_formula():
    k = 3.0
    assert ks_distance(draw(shift=k), lambda y: logit_normal_cdf(y / (k - (k - 1) * y))) < 0.015


def test_uniform_schedule():
    assert ks_distance(draw(flow_use_uniform_schedule=True), lambda x: x) < 0.015


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.5, 0.5), (1.0, 3.0)])
def test_beta_schedule_has_the_moments_of_the_beta_distribution(a: float, b: float):
    sigma = draw(
        flow_use_beta_schedule=True, flow_beta_schedule_alpha=a, flow_beta_schedule_beta=b
    ).double()
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert float(sigma.mean()) == pytest.approx(a / (a + b), abs=0.01)
    assert float(sigma.var()) == pytest.approx(variance, abs=0.005)


@pytest.mark.parametrize("keys", [{}, {"flow_use_uniform_schedule": True}])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_an_expert_gets_sigmas_of_its_range_in_the_proportions_of_the_whole(keys, shift):
    low = draw(expert=Expert("low", 0.0, 0.9), shift=shift, **keys)
    whole = draw(200_000, shift=shift, **keys)
    inside = whole[whole < 0.9]
    assert float(low.max()) <= 0.9
    for q in (0.1, 0.5, 0.9):
        assert float(low.quantile(q)) == pytest.approx(float(inside.quantile(q)), abs=0.02)


def test_experts_are_drawn_by_the_mass_of_their_ranges():
    experts = (Expert("high", 0.9, 1.0), Expert("low", 0.0, 0.9))
    sampler = SigmaSampler(CoreSettings(flow_use_uniform_schedule=True), experts)
    roles = [sampler.expert(1, Moment(step), 1.0).role for step in range(2000)]
    assert roles.count("high") / len(roles) == pytest.approx(0.1, abs=0.03)


def test_auto_shift_is_clamped_at_both_ends_of_the_schedulers_range():
    assert auto_shift(256) == pytest.approx(math.exp(0.5))
    assert auto_shift(4096) == pytest.approx(math.exp(1.15))
    assert auto_shift(32_760) == auto_shift(4096)
    assert auto_shift(1) == auto_shift(256)


def test_shift_keeps_the_ends_and_shift_one_changes_nothing():
    s = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(shifted(s, 1.0), s)
    assert shifted(s, 3.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert float(shifted(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)


def test_a_velocity_step_from_the_noised_input_reaches_the_clean_latents():
    x0, eps = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma = torch.tensor([0.25, 1.0])
    made = noised(x0, eps, sigma, conditioning={}, role="transformer", moment=Moment(1))
    s = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(made.x_t - s * made.target, x0)
    torch.testing.assert_close(made.x_t + (1 - s) * made.target, eps)
    assert made.t.tolist() == [250.0, 1000.0]


def test_every_rank_draws_the_same_expert_for_a_micro_batch():
    experts = (Expert("high", 0.5, 1.0), Expert("low", 0.0, 0.5))
    sampler = SigmaSampler(CoreSettings(), experts)
    roles = [
        [
            sampler.expert(1, Moment(step, micro, rank), 1.0).role
            for step in range(40)
            for micro in (0, 1)
        ]
        for rank in (0, 3)
    ]
    assert roles[0] == roles[1]
    assert len(set(roles[0])) == 2
    assert roles[0][::2] != roles[0][1::2], "micro-batches of a step draw for themselves"


def test_the_shares_of_experts_are_told_where_they_are_known():
    experts = (Expert("high", 0.9, 1.0), Expert("low", 0.0, 0.9))
    said = shares_sentence(CoreSettings(flow_use_uniform_schedule=True), experts)
    assert str(said).startswith("share of the micro-batches: high 10.0%, low 90.0%")
    assert shares_sentence(CoreSettings(flow_schedule_auto_shift=True), experts) is None
    assert shares_sentence(CoreSettings(), experts[:1]) is None
