"""Which tokens are kept: counts, statistics, and what a draw depends on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from trainer_core.errors import PluginError
from trainer_core.run import FORCE_KEEP
from trainer_core.types import Moment
from trainer_tread.hooks import Forced, Kept
from trainer_tread.routing import keep_at_random, num_kept

AT = Moment(step=3, micro=1, rank=0)


def kept(run, *, drop_ratio=0.5, index=0):
    return Kept(run, index, (1, 2), drop_ratio, Forced(run))


def draw(num_samples, num_tokens, count, *, seed=0, forced=None):
    generator = torch.Generator().manual_seed(seed)
    return keep_at_random(num_samples, num_tokens, count, generator=generator, forced=forced)


@pytest.mark.parametrize(
    ("num_tokens", "drop_ratio", "count"),
    [
        (29640, 0.1, 26676), (29640, 0.25, 22230), (29640, 0.35, 19266), (29640, 0.5, 14820),
        (10, 0.35, 6), (5, 0.7, 1), (4, 0.9, 1), (1, 0.99, 1), (7, 0.0, 7), (48, 0.0, 48),
    ],
)  # fmt: skip
def test_counts_of_appendix_a(num_tokens: int, drop_ratio: float, count: int):
    assert num_kept(num_tokens, drop_ratio) == count


def test_ids_ascend_and_dropping_nothing_keeps_the_order():
    ids = draw(3, 40, 17)
    assert ids.shape == (3, 17)
    assert ids.dtype == torch.int64
    assert bool((ids[:, 1:] > ids[:, :-1]).all())
    assert torch.equal(draw(3, 40, 40), torch.arange(40).expand(3, -1))


def test_every_position_and_every_pair_is_kept_as_often_as_chance_says():
    """O-T8: mean k; covariance -k(1-k)/(S-1) within a sample, 0 between samples."""
    num_tokens, count, trials = 8, 3, 20000
    k = count / num_tokens
    ids = draw(2 * trials, num_tokens, count).view(trials, 2, count)
    marks = torch.zeros(trials, 2, num_tokens, dtype=torch.float64).scatter(2, ids, 1.0)
    bound = 4 * math.sqrt(k * (1 - k) / trials)
    assert (marks.mean(0) - k).abs().max() < bound
    first, second = (marks - k).unbind(1)
    within, between = first.T @ first / trials, first.T @ second / trials
    apart = ~torch.eye(num_tokens, dtype=torch.bool)
    assert (within[apart] + k * (1 - k) / (num_tokens - 1)).abs().max() < bound
    assert between.abs().max() < bound


def test_a_draw_depends_on_seed_moment_and_route_and_on_nothing_else(make_run):
    run = make_run(seed=5)
    wanted = kept(run).ids(2, 60, AT)
    torch.rand(3)
    run.moment = Moment(step=99)
    assert torch.equal(kept(make_run(seed=5)).ids(2, 60, AT), wanted)
    others = [
        kept(make_run(seed=6)).ids(2, 60, AT),
        kept(run, index=1).ids(2, 60, AT),
        *(kept(run).ids(2, 60, replace(AT, **{name: 7})) for name in ("step", "micro", "rank")),
    ]
    assert not [ids for ids in others if torch.equal(ids, wanted)]
    assert not torch.equal(wanted[0], wanted[1]), "each sample has its own draw"


def test_the_global_generator_is_left_alone(make_run):
    before = torch.get_rng_state()
    kept(make_run()).ids(2, 60, AT)
    assert torch.equal(torch.get_rng_state(), before)


def forced_mask(*counts: int, num_tokens: int = 20) -> torch.Tensor:
    mask = torch.zeros(len(counts), num_tokens, dtype=torch.bool)
    for sample, count in enumerate(counts):
        mask[sample, 1 : 1 + 2 * count : 2] = True
    return mask


@pytest.mark.parametrize(("counts", "wanted"), [((3, 0), 5), ((5, 2), 5), ((8, 2), 8)])
def test_forced_tokens_are_kept_and_may_raise_the_count(make_run, counts, wanted: int):
    run, mask = make_run(), forced_mask(*counts)
    run.state[FORCE_KEEP] = mask
    ids = kept(run, drop_ratio=0.75).ids(2, 20, AT)
    marks = torch.zeros(2, 20, dtype=torch.bool).scatter(1, ids, True)
    assert ids.shape == (2, wanted)
    assert bool(marks[mask].all())


def test_forcing_nothing_changes_nothing_and_the_rest_is_drawn_as_before(make_run):
    run = make_run()
    wanted = kept(run).ids(2, 20, AT)
    run.state[FORCE_KEEP] = None
    assert torch.equal(kept(run).ids(2, 20, AT), wanted)
    run.state[FORCE_KEEP] = torch.zeros(2, 20, dtype=torch.bool)
    assert torch.equal(kept(run).ids(2, 20, AT), wanted)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, wanted[0, :3]] = True  # kept anyway
    run.state[FORCE_KEEP] = mask
    assert torch.equal(kept(run).ids(2, 20, AT), wanted)


def test_a_mask_is_counted_anew_for_each_micro_batch(make_run):
    run, mask = make_run(), forced_mask(6, 0)
    run.state[FORCE_KEEP] = mask
    route = kept(run, drop_ratio=0.9)
    assert route.ids(2, 20, AT).shape == (2, 6)
    mask[1] = True  # the same tensor, filled anew
    assert route.ids(2, 20, replace(AT, micro=2)).shape == (2, 20)
    run.state[FORCE_KEEP] = forced_mask(4, 1)
    assert route.ids(2, 20, AT).shape == (2, 4)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 19, dtype=torch.bool), torch.ones(1, 20, dtype=torch.bool),
             torch.ones(2, 20)]
)  # fmt: skip
def test_a_mask_of_another_micro_batch_is_refused(make_run, mask):
    run = make_run()
    run.state[FORCE_KEEP] = mask
    with pytest.raises(PluginError, match=r"FORCE_KEEP must be a mask of shape \(2, 20\), bool"):
        kept(run).ids(2, 20, AT)
