"""Both experts in one run: each is trained by its own share of the noise levels, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer_core.hookspecs import hookimpl
from trainer_core.testing.harness import Finished, train
from trainer_core.types import PluginInfo
from trainer_wan import Wan
from trainer_wan.config import WanSettings
from trainer_wan.resting import Resting

umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")

HIGH, LOW = "transformer", "transformer_2"
FILES = {
    HIGH: "pytorch_lora_weights.safetensors",
    LOW: "pytorch_lora_weights_transformer_2.safetensors",
}
STEPS = 6


class Spy:
    """Notes what was drawn and which adapters have a gradient."""

    info = PluginInfo(summary="notes what was drawn")
    seen: list[tuple[int, str, float]]

    def __init__(self, settings: None = None) -> None:
        self.seen = []

    @hookimpl
    def compute_loss(self, output: Any) -> None:
        inputs = output.inputs
        self.seen.append((inputs.moment.step, inputs.role, float(inputs.sigma[0])))


PLUGINS = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "spy": Spy}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("both")


@pytest.fixture(scope="module")
def run_both(folder, checkpoints):
    """Return a maker of finished runs of both experts."""

    def make(output: str, named: tuple[str, ...] = tuple(PLUGINS), **keys: Any) -> Finished:
        settings = {
            "model_flavour": "t2v-14b-2.2-both",
            "pretrained_model_name_or_path": str(checkpoints("t2v-14b-2.2-both")),
            "model_type": "lora",
            "lora_rank": 2,
            "train_batch_size": 1,
            "max_train_steps": STEPS,
            "checkpoint_step_interval": 1,
            "checkpoints_total_limit": 0,
            "flow_schedule_shift": 7.0,
            "use_ema": True,
            **keys,
        }
        return train(folder, plugins=PLUGINS, named=named, settings=settings, output=output)

    return make


@pytest.fixture(scope="module")
def finished(run_both) -> Finished:
    return run_both("plain")


def weights_after(done: Finished, step: int, role: str) -> dict[str, torch.Tensor]:
    return load_file(done.folder / f"checkpoint-{step}" / FILES[role])


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_each_micro_batch_belongs_to_the_expert_of_its_noise_level(finished):
    seen = finished.plugin("spy").seen
    assert len(seen) == STEPS
    assert {role for _, role, _ in seen} == {HIGH, LOW}
    for _, role, sigma in seen:
        assert (role == HIGH) == (sigma >= 0.875)


def test_a_step_changes_the_drawn_expert_alone(finished):
    """Weights, averages and the optimiser's state of the other one stay bit for bit."""
    drawn = {step: role for step, role, _ in finished.plugin("spy").seen}
    for step in range(2, STEPS + 1):
        for role in (HIGH, LOW):
            before, after = (weights_after(finished, s, role) for s in (step - 1, step))
            assert same(before, after) == (role != drawn[step])
        averages = [
            load_file(finished.folder / f"checkpoint-{s}" / "ema.safetensors")
            for s in (step - 1, step)
        ]
        changed = {
            name.split(".")[0] for name in averages[0]
            if not torch.equal(averages[0][name], averages[1][name])
        } - {"num_updates"}  # fmt: skip
        assert changed == {drawn[step]}


@pytest.mark.parametrize(
    "optimizer", ["adamw", "optimi-adamw", "optimi-lion", "optimi-stableadamw"]
)
def test_no_optimiser_touches_or_counts_a_step_of_the_resting_expert(run_both, optimizer):
    """As many steps are counted as were taken: bias correction is that of a run of its own."""
    done = run_both(optimizer, optimizer=optimizer, use_ema=False)
    drawn = [role for _, role, _ in done.plugin("spy").seen]
    for step in range(2, STEPS + 1):
        for role in (HIGH, LOW):
            before, after = (weights_after(done, s, role) for s in (step - 1, step))
            assert same(before, after) == (role != drawn[step - 1])
    last = done.folder / f"checkpoint-{STEPS}"
    state = load_file(last / "optimizer.safetensors")
    counted = [int(state[f"group{i}/step"]) for i in range(2) if f"group{i}/step" in state]
    if optimizer == "adamw":
        steps = {name: int(value) for name, value in state.items() if name.endswith("/step")}
        half = len(steps) // 2
        numbers = sorted(steps, key=lambda name: int(name.split("/")[0]))
        counted = [steps[numbers[0]], steps[numbers[half]]]
    if counted:
        assert counted == [drawn.count(HIGH), drawn.count(LOW)]
    assert len(json.loads((last / "optimizer.json").read_text())["param_groups"]) == 2


def test_the_run_says_how_often_each_is_drawn(finished):
    (line,) = [line for line in finished.said if line.startswith("share of the micro-batches")]
    # of a logit-normal draw s, 7 s / (1 + 6 s) is above 0.875 where s is above 1/2
    assert line.startswith("share of the micro-batches: transformer 50.0%, transformer_2 50.0%")


def test_both_adapters_differ_and_a_single_stage_run_writes_one(finished):
    high, low = (load_file(finished.folder / FILES[role]) for role in (HIGH, LOW))
    assert high.keys() == low.keys()
    assert not same(high, low)
    assert sorted(finished.weights()) == sorted(
        [*FILES.values(), *(f"ema/{f}" for f in FILES.values())]
    )


# --- one of them at a time on the device --------------------------------------------------------


def test_with_one_expert_resident_no_bit_changes(run_both, finished):
    done = run_both("resident", wan_one_expert_resident=True)
    assert done.steps == finished.steps
    assert done.weights() == finished.weights()


def test_all_weights_of_both_are_trained_and_written_as_a_pipeline(run_both, checkpoints):
    from diffusers import WanPipeline

    keys = {"model_type": "full", "use_ema": False, "checkpoint_step_interval": 0}
    done = run_both("full", named=("wan", "spy"), **keys)
    pipeline = WanPipeline.from_pretrained(done.folder / "pipeline")
    stock = WanPipeline.from_pretrained(checkpoints("t2v-14b-2.2-both"))
    assert pipeline.config.boundary_ratio == 0.875
    for role in (HIGH, LOW):
        now, before = (getattr(each, role).state_dict() for each in (pipeline, stock))
        assert not same(now, before)


@pytest.fixture
def pair(make_run, checkpoints):
    run = make_run(
        model_flavour="t2v-14b-2.2-both",
        pretrained_model_name_or_path=str(checkpoints("t2v-14b-2.2-both")),
    )
    plugin = Wan(WanSettings(wan_one_expert_resident=True))
    run.spec = plugin.describe_model(run)
    run.model = plugin.load_model(run)
    return plugin, run


def test_the_other_expert_goes_before_one_comes(pair, monkeypatch):
    _, run = pair
    networks = {role: run.model.bare(role) for role in (HIGH, LOW)}
    names = {id(network): role for role, network in networks.items()}
    moved = []
    monkeypatch.setattr(
        "trainer_wan.resting.move_frozen",
        lambda n, device: moved.append((names[id(n)], str(device))),
    )
    resting = Resting(networks, device=torch.device("cuda:0"))
    assert moved == [(HIGH, "cpu"), (LOW, "cpu")]
    for role, expected in (
        (HIGH, [(LOW, "cpu"), (HIGH, "cuda:0")]),
        (HIGH, []),
        (LOW, [(HIGH, "cpu"), (LOW, "cuda:0")]),
    ):
        moved.clear()
        resting.wake(role)
        assert moved == expected


def test_every_forward_wakes_its_expert(pair, make_inputs):
    plugin, run = pair
    plugin.attach(run)
    woken = []
    for role in (HIGH, LOW):
        network = run.model.bare(role)
        before = network.before_forward
        network.before_forward = lambda role=role, before=before: (woken.append(role), before())
    from dataclasses import replace

    for role in (LOW, HIGH, HIGH):
        run.predict(replace(make_inputs(), role=role))
    assert woken == [LOW, HIGH, HIGH]
