"""TREAD, CREPA and scheduled sampling in every combination: each acts, and none moves another's draws."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.harness import Finished, train

tread = pytest.importorskip("trainer_tread")
crepa = pytest.importorskip("trainer_crepa")
rollout = pytest.importorskip("trainer_scheduled_sampling")
testing = pytest.importorskip("trainer_crepa.testing")

PLUGINS = {
    "tread": tread.Tread,
    "crepa": crepa.Crepa,
    "scheduled_sampling": rollout.ScheduledSampling,
}
SUBSETS = list(chain.from_iterable(combinations(PLUGINS, n) for n in range(len(PLUGINS) + 1)))
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}
MARKS = {"crepa": "crepa", "scheduled_sampling": "scheduled_sampling/rolled"}
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("techniques")
    testing.write_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def runs(world: Path) -> dict[tuple[str, ...], Finished]:
    """One config file for all runs, which differ in --plugins alone."""
    settings: dict[str, Any] = {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "tread_config": {"routes": [ROUTE]},
        "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"),
        "crepa_encoder_image_size": 64,
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
    }
    return {
        subset: train(
            world, plugins=PLUGINS, named=list(subset), settings=settings,
            output="+".join(subset) or "none",
        )
        for subset in SUBSETS
    }  # fmt: skip


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_data_order_noise_and_global_state_are_those_of_a_plain_run(runs, subset):
    assert runs[subset].draws == runs[()].draws
    assert len(runs[subset].draws) == 2 * STEPS


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_each_of_them_acts(runs, subset):
    step = runs[subset].steps[0]
    for name, mark in MARKS.items():
        assert (mark in step) == (name in subset)
    for name in subset:
        fewer = tuple(other for other in subset if other != name)
        assert runs[fewer].weights() != runs[subset].weights(), f"{name} changed nothing"


def test_a_rollout_is_the_same_with_routes_and_taps_or_without(runs):
    """It predicts in eval mode, without them: the first step rolls out the same way."""
    both = [runs[subset].steps[0] for subset in SUBSETS if "scheduled_sampling" in subset]
    for name in ("scheduled_sampling/rolled", "scheduled_sampling/drift"):
        assert len({step[name] for step in both}) == 1
