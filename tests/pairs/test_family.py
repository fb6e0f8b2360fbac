"""The techniques on the real network of TI2V 5B, whose tokens have timesteps of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.harness import Finished, Interrupted, attempt, train

wan = pytest.importorskip("trainer_wan")
umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
tread = pytest.importorskip("trainer_tread")
crepa = pytest.importorskip("trainer_crepa")
rollout = pytest.importorskip("trainer_scheduled_sampling")
testing = pytest.importorskip("trainer_crepa.testing")

MODEL = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora}
TECHNIQUES = {
    "tread": tread.Tread,
    "crepa": crepa.Crepa,
    "scheduled_sampling": rollout.ScheduledSampling,
}
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}
STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer_wan.testing import write_checkpoint

    folder = tmp_path_factory.mktemp("family")
    testing.write_teacher(folder / "teacher")
    write_checkpoint(folder / "model", flavour="ti2v-5b-2.2", layers=3)
    return folder


def settings(world: Path, **keys: Any) -> dict[str, Any]:
    return {
        "model_type": "lora",
        "lora_rank": 2,
        "model_flavour": "ti2v-5b-2.2",
        "pretrained_model_name_or_path": str(world / "model"),
        "wan_first_frame_probability": 0.5,
        "resolution": 64,
        "max_train_steps": STEPS,
        "tread_config": {"routes": [ROUTE]},
        "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"),
        "crepa_encoder_image_size": 64,
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
        **keys,
    }


@pytest.fixture(scope="module")
def runs(world: Path) -> dict[tuple[str, ...], Finished]:
    """With no technique, with each alone, with all; one config file."""
    subsets = [(), *((name,) for name in TECHNIQUES), tuple(TECHNIQUES)]
    return {
        subset: train(
            world, plugins={**MODEL, **TECHNIQUES}, named=[*MODEL, *subset],
            settings=settings(world), output="+".join(subset) or "none",
        )
        for subset in subsets
    }  # fmt: skip


def test_each_technique_acts_and_moves_no_draw(runs):
    plain = runs[()]
    for subset, done in runs.items():
        assert done.draws == plain.draws
        assert len(done.steps) == STEPS
        assert (done.weights() == plain.weights()) == (subset == ())


def test_with_all_of_them_an_interrupted_run_ends_with_the_same_bits(world, runs):
    plugins = {**MODEL, **TECHNIQUES}
    arguments = {"plugins": plugins, "settings": settings(world), "output": "again"}
    assert isinstance(attempt(world, **arguments, crash_at=3).error, Interrupted)
    done = train(world, **arguments)
    assert {draw.step for draw in done.draws} == {3, 4}
    assert done.steps == runs[tuple(TECHNIQUES)].steps
    assert done.weights() == runs[tuple(TECHNIQUES)].weights()


def test_one_timestep_a_clip_trains_to_the_same_numbers(world, runs):
    """Where no first frame is given, all tokens of a clip have the same timestep: only rounding moves."""
    losses = []
    for collapsed in (False, True):
        keys = {"wan_first_frame_probability": 0.0, "wan_force_2_1_time_embedding": collapsed}
        done = train(
            world, plugins={**MODEL, **TECHNIQUES}, named=[*MODEL, "tread"],
            settings=settings(world, **keys), output=f"collapsed-{collapsed}",
        )  # fmt: skip
        losses.append([event["loss"] for event in done.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    given = [event["loss"] for event in runs[("tread",)].steps]
    assert given != pytest.approx(losses[0], rel=1e-4), "given first frames change the loss"
