"""Who is rolled out, from where, and what is learnt, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from trainer_scheduled_sampling import rollout

GRID = rollout.at(torch.arange(11).double(), torch.linspace(1, 0, 11))
SHIFTED = 3 * torch.linspace(1, 0, 11) / (1 + 2 * torch.linspace(1, 0, 11))


def counts(num=40_000, probability=1.0, most=10, strategy="uniform", seed=0):
    draw = torch.Generator().manual_seed(seed)
    return rollout.draw_counts(
        num, probability=probability, most=most, strategy=strategy, generator=draw
    )


@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        ("linear", 50, 0.2), ("linear", 100, 0.2), ("linear", 150, 0.3), ("linear", 200, 0.4),
        ("linear", 300, 0.6), ("linear", 999, 0.6), ("cosine", 100, 0.2),
        ("cosine", 150, 0.2 + 0.4 * (0.5 - 0.5 * math.cos(math.pi / 4))), ("cosine", 200, 0.4),
        ("cosine", 300, 0.6),
    ],
)  # fmt: skip
def test_the_ramp_in_closed_form(shape, step, expected):
    """O-R7."""
    found = rollout.ramp(step, first=0.2, last=0.6, start=100, length=200, shape=shape)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_ramp_without_length_is_a_step():
    found = [
        rollout.ramp(step, first=0.2, last=0.6, start=100, length=0, shape="linear")
        for step in (99, 100, 101)
    ]
    assert found == [0.2, 0.6, 0.6]


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_the_share_of_rolled_samples(probability):
    rolled = (counts(probability=probability) > 0).double().mean()
    assert abs(rolled - probability) <= 4 * math.sqrt(probability * (1 - probability) / 40_000)


@pytest.mark.parametrize(
    ("strategy", "mean"), [("uniform", 5.5), ("biased_early", 4.0), ("biased_late", 7.0)]
)
def test_the_lengths_of_rollouts(strategy, mean):
    """1 to 10; the biased ones have the mean 1 + 9 / 3 and 1 + 2 * 9 / 3."""
    found = counts(strategy=strategy)
    assert int(found.min()) == 1
    assert int(found.max()) == 10
    assert float(found.double().mean()) == pytest.approx(mean, abs=0.06)
    for m in range(11):
        share = (found <= m).double().mean()
        expected = rollout.share_up_to(m, most=10, strategy=strategy)
        assert abs(share - expected) < 4 * math.sqrt(0.25 / 40_000)


def test_the_mean_of_the_longest_rollout_of_a_batch():
    table = counts(num=60_000, probability=0.5, most=4).view(-1, 3)
    expected = rollout.expected_most(
        lambda m: rollout.share_up_to(m, most=4, strategy="uniform"),
        most=4, num_samples=3, probability=0.5,
    )  # fmt: skip
    assert float(table.amax(1).double().mean()) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("grid", [GRID, SHIFTED])
def test_places_and_levels_are_inverse(grid):
    levels = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(rollout.at(rollout.place(levels, grid), grid), levels)


def test_a_path_follows_the_grid_and_ends_at_its_own_level():
    """O-R8: on an even grid the steps are its own; each ends exactly at sigma, none leaves the grid."""
    sigma = torch.tensor([0.35, 0.35, 0.95, 0.82])
    found = rollout.paths(sigma, torch.tensor([3, 0, 5, 5]), GRID)
    assert torch.equal(found[-1], sigma)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.65, 0.55, 0.45, 0.35]))
    assert torch.equal(found[:, 1], sigma[1].expand(4))
    assert torch.equal(found[:, 2], sigma[2].expand(4)), "no whole step above it: not rolled out"
    torch.testing.assert_close(found[:, 3], torch.tensor([0.92, 0.92, 0.92, 0.82]))
    assert len(found) == 4, "as many steps as the longest takes, clamped ones not counted"


def test_a_path_on_a_shifted_grid_keeps_its_place_between_the_points():
    sigma = ((SHIFTED[7] + SHIFTED[8]) / 2)[None]
    found = rollout.paths(sigma, torch.tensor([2]), SHIFTED)[:, 0]
    expected = torch.stack([(SHIFTED[k] + SHIFTED[k + 1]) / 2 for k in (5, 6, 7)])
    torch.testing.assert_close(found, expected)


def test_every_path_ends_at_the_very_bits_of_its_level():
    draw = torch.Generator().manual_seed(1)
    sigma = torch.rand(500, generator=draw) * 0.9
    found = rollout.paths(sigma, torch.full((500,), 2), SHIFTED)
    assert torch.equal(found[-1], sigma)


def test_all_ranks_can_take_the_same_number_of_steps():
    found = rollout.paths(torch.tensor([0.5]), torch.tensor([2]), GRID, steps=5)
    assert found.shape == (6, 1)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.7, 0.7, 0.7, 0.7, 0.6, 0.5]))


def test_endpoint_and_noise_targets_differ_by_drift_over_sigma():
    """O-R3: x = x_sigma + delta; .05 / .6 = .0833."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, generator=draw) for _ in range(2))
    sigma = torch.tensor([0.6, 0.2])
    x_t = (1 - sigma.view(-1, 1, 1)) * x0 + sigma.view(-1, 1, 1) * eps
    found = rollout.endpoint_target(x_t + 0.05, x0, sigma) - (eps - x0)
    expected = (0.05 / sigma).view(-1, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    one_step = x_t + 0.05 - sigma.view(-1, 1, 1) * rollout.endpoint_target(x_t + 0.05, x0, sigma)
    torch.testing.assert_close(one_step, x0, atol=1e-6, rtol=0)
    with_noise = x_t + 0.05 - sigma.view(-1, 1, 1) * (eps - x0)
    torch.testing.assert_close(with_noise, x0 + 0.05, atol=1e-6, rtol=0)


def test_the_endpoint_target_stays_finite_at_no_noise():
    assert (
        rollout.endpoint_target(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1)).isfinite().all()
    )


def test_the_anti_drift_term_in_closed_form():
    """O-R9: 0 along the way back, 2 across it, 4 against it, whatever the size of v."""
    x0, x = torch.zeros(4, 2), torch.tensor([[1.0, 0.0]] * 4)
    v = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.01, 0.0]])
    torch.testing.assert_close(rollout.towards_data(v, x, x0), torch.tensor([0.0, 2.0, 4.0, 0.0]))


def test_drift_is_relative():
    on_path = torch.full((2, 3, 4), 2.0)
    moved = on_path * torch.tensor([1.0, 1.1]).view(2, 1, 1)
    torch.testing.assert_close(rollout.drift(moved, on_path), torch.tensor([0.0, 0.1]))


def test_no_source_lies_above_what_an_expert_knows():
    grid = torch.linspace(1, 0, 11)
    sigma, counts = torch.tensor([0.85, 0.65, 0.35, 0.2]), torch.full((4,), 3)
    levels = rollout.paths(sigma, counts, grid, highest=0.875)
    assert torch.allclose(levels[0], torch.tensor([0.85, 0.85, 0.65, 0.5]))
    assert float(levels.max()) <= 0.875
    assert torch.equal(levels[-1], sigma)
    free = rollout.paths(sigma, counts, grid)
    assert torch.equal(free, rollout.paths(sigma, counts, grid, highest=1.0))
    assert float(free.max()) > 0.875
