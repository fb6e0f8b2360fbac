from __future__ import annotations

from collections import Counter

import pytest

from trainer_core.data.sampler import Sampler
from trainer_core.testing.clips import write_clips


@pytest.fixture
def mixed(world):
    """Two datasets; the first has two buckets, one of them with an odd count."""
    for name, sizes, n in (("a", [(64, 64), (128, 64), (64, 64)], 9), ("b", [(64, 64)], 2)):
        write_clips(world.folder(name), n=n, sizes=sizes, frames=9, fps=16)
        world.add(name, video={"num_frames": 5}, repeats=1 if name == "a" else 0)
    return world


def epoch(sampler, number):
    count = sampler.groups_per_epoch
    return [sampler.group(number * count + k) for k in range(count)]


def test_every_sample_is_seen_as_often_as_repeats_say_and_buckets_never_mix(mixed):
    mixed.keys["train_batch_size"] = 4
    mixed.keys["disable_bucket_pruning"] = True
    plan = mixed.plan()
    sampler = Sampler(plan)
    bucket_of = {i: b.name + str(b.dataset) for b in plan.buckets for i in b.samples}
    groups = epoch(sampler, 0)
    assert all(len({bucket_of[i] for i in group}) == 1 for group in groups)
    # 12 uses, 6 uses in groups of 4 (2 filled), 2 uses in a smaller group
    assert sorted(len(g) for g in groups) == [2, 4, 4, 4, 4, 4]
    assert list(sampler.filled.values()) == [2]
    seen = Counter(i for group in groups for i in group)
    assert sum(seen.values()) == 22
    for index, sample in enumerate(plan.samples):
        assert seen[index] >= sample.uses
    assert sum(seen[i] - plan.samples[i].uses for i in seen) == 2


def test_the_order_is_a_function_of_seed_and_epoch(mixed):
    first, again = Sampler(mixed.plan()), Sampler(mixed.plan())
    assert epoch(first, 0) != epoch(first, 1)
    # asked in another order, in the middle of an epoch, by a fresh object
    last = 3 * first.groups_per_epoch
    forwards = [first.group(k) for k in range(last)]
    assert [again.group(k) for k in reversed(range(last))] == forwards[::-1]
    mixed.keys["seed"] = 1
    assert epoch(Sampler(mixed.plan()), 0) != forwards[: first.groups_per_epoch]


def test_processes_share_a_group_of_one_bucket(mixed):
    mixed.keys["disable_bucket_pruning"] = True
    single = Sampler(mixed.plan(world_size=2))
    for number in range(single.groups_per_epoch):
        parts = [single.batch(number, rank) for rank in (0, 1)]
        assert parts[0] + parts[1] == single.group(number)
        assert len(parts[0]) == len(parts[1])


def test_probability_weighs_the_datasets(mixed):
    mixed.entries[0]["probability"] = 1
    mixed.entries[1]["probability"] = 3
    plan = mixed.plan()
    sampler = Sampler(plan)
    names = [plan.dataset_of(plan.samples[g[0]]).id for g in epoch(sampler, 0) + epoch(sampler, 1)]
    share = Counter(names)["b"] / len(names)
    assert share == pytest.approx(0.75, abs=0.06)
    # a dataset with a small share still goes through all of its samples, over several epochs
    seen = {i for k in range(8) for group in epoch(sampler, k) for i in group}
    assert seen == set(range(len(plan.samples)))


def test_held_out_data_is_never_sampled(mixed):
    mixed.entries[1]["dataset_type"] = "eval"
    plan = mixed.plan()
    sampler = Sampler(plan)
    names = {plan.dataset_of(plan.samples[i]).id for g in epoch(sampler, 0) for i in g}
    assert names == {"a"}
