"""Through the real loop on the tiny model: what a rollout changes, and all that it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import CheckpointError, ConfigError, ModelInputs, Moment, PluginInfo, hookimpl
from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_core.types import Expert, ModelSpec
from trainer_scheduled_sampling import ScheduledSampling
from trainer_scheduled_sampling.config import ScheduledSamplingSettings

STEPS = 4
ON = {"scheduled_sampling_max_step_offset": 3, "scheduled_sampling_probability": 0.6}
STEP_KEYS = ("loss", "grad_norm", "lr")


class Watched(ScheduledSampling):
    """Remembers the inputs of each micro-batch before and after."""

    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.seen: list[tuple[ModelInputs, ModelInputs]] = []
        self.levels_seen: list[torch.Tensor] = []
        self.terms: list[Any] = []

    @hookimpl
    def prepare_inputs(self, run, inputs):
        made = super().prepare_inputs(run, inputs)
        self.seen.append((inputs, made))
        return made

    def levels(self, run, inputs):
        found = super().levels(run, inputs)
        self.levels_seen.append(found)
        return found

    @hookimpl
    def compute_loss(self, run, output):
        term = super().compute_loss(run, output)
        self.terms.append((term, output))
        return term


class Counter:
    """Wraps the model's network and counts its forwards, with what was on in each."""

    info = PluginInfo(summary="Counts forwards")

    def __init__(self, settings) -> None:
        self.forwards: list[tuple[bool, bool, bool, int]] = []
        self.asked: list[ModelInputs] = []

    def attach(self, run):
        network = run.model.networks["transformer"]

        def look(module, arguments):
            inputs, plan = arguments
            acts = bool(plan.routes or plan.taps)
            self.asked.append(inputs)
            self.forwards.append(
                (torch.is_grad_enabled(), module.training, acts, len(inputs.sigma))
            )

        network.register_forward_pre_hook(look)


class Shifter:
    """Comes first and leaves x_t off the path."""

    info = PluginInfo(summary="Shifts x_t")

    def __init__(self, settings) -> None:
        pass

    @hookimpl
    def prepare_inputs(self, inputs):
        return replace(inputs, x_t=inputs.x_t + 0.01)


def run(folder: Path, *, keys: dict[str, Any] | None = None, plugins=None, **more: Any) -> Finished:
    found = {"scheduled_sampling": Watched} if plugins is None else plugins
    settings = {"max_train_steps": STEPS, **(keys if keys is not None else ON)}
    return train(folder, plugins=found, settings=settings, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollout")


@pytest.fixture(scope="module")
def without(world: Path) -> Finished:
    return run(world, keys={}, plugins={}, output="without")


@pytest.mark.parametrize(
    "keys",
    [
        {**ON, "scheduled_sampling_max_step_offset": 0},
        {**ON, "scheduled_sampling_probability": 0.0},
        {**ON, "scheduled_sampling_ramp_steps": 9, "scheduled_sampling_prob_end": 0.0},
    ],
    ids=["no steps", "no share", "a ramp from 0 to 0"],
)
def test_off_is_bit_identical(world: Path, without: Finished, keys, request):
    """O-R1."""
    done = run(world, keys=keys, output=request.node.callspec.id)
    assert done.weights() == without.weights()
    assert done.draws == without.draws
    assert done.steps == without.steps


def test_on_it_changes_the_loss_and_no_draw(world: Path, without: Finished):
    done = run(world, output="on")
    assert done.draws == without.draws
    assert [s["loss"] for s in done.steps] != [s["loss"] for s in without.steps]
    rolled = [s["scheduled_sampling/rolled"] for s in done.steps]
    assert any(rolled)
    assert all(
        s["scheduled_sampling/drift"] > 0 for s in done.steps if s["scheduled_sampling/rolled"]
    )


def test_samples_that_are_not_rolled_stay_as_they_were(world: Path):
    """O-R1: in a mixed batch, bit for bit, target and weight included."""
    done = run(
        world,
        keys={**ON, "scheduled_sampling_target": "endpoint", "scheduled_sampling_weight": 0.5},
        plugins={"a_shifter": Shifter, "scheduled_sampling": Watched},
        output="mixed",
    )
    plugin, mixed = done.plugin("scheduled_sampling"), 0
    for (before, after), levels in zip(plugin.seen, plugin.levels_seen, strict=True):
        rolled = levels[0] > levels[-1]
        s = before.sigma.view(-1, 1, 1, 1, 1)
        assert not torch.allclose(before.x_t, (1 - s) * before.x0 + s * before.eps)
        mixed += bool(rolled.any() and not rolled.all())
        for name in ("x_t", "target", "loss_weight"):
            was, now = getattr(before, name), getattr(after, name)
            same = torch.tensor([torch.equal(a, b) for a, b in zip(was, now, strict=True)])
            assert torch.equal(same, ~rolled), name
        assert after.sigma is before.sigma
        assert after.t is before.t
        torch.testing.assert_close(
            after.target[rolled],
            (after.x_t - after.x0)[rolled] / after.sigma[rolled].view(-1, 1, 1, 1, 1),
        )
    assert mixed


@pytest.mark.parametrize(
    ("solver", "stages"), [("euler", 1), ("heun", 2), ("rk4", 4), ("unipc", 1)]
)
def test_predictions_are_few_without_gradient_and_unrouted(world: Path, solver, stages):
    """O-R6: the longest rollout of the batch times the stages; the whole micro-batch each time."""
    tread = pytest.importorskip("trainer_tread").Tread
    route = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}
    done = run(
        world,
        keys={**ON, "scheduled_sampling_sampler": solver, "tread_config": {"routes": [route]}},
        plugins={"scheduled_sampling": Watched, "tread": tread, "counter": Counter},
        output=f"calls {solver}",
    )
    expected = []
    for levels in done.plugin("scheduled_sampling").levels_seen:
        expected += [(False, False, False, 2)] * (stages * (len(levels) - 1))
        expected += [(True, True, True, 2)]
    assert done.plugin("counter").forwards == expected
    assert len(expected) > STEPS


def test_a_rollout_begins_on_the_path_at_its_source_and_tells_the_model_its_level(world: Path):
    done = run(
        world,
        keys={**ON, "scheduled_sampling_probability": 1.0},
        plugins={"scheduled_sampling": Watched, "counter": Counter},
        output="path",
    )
    plugin, asked = done.plugin("scheduled_sampling"), iter(done.plugin("counter").asked)
    steps = 0
    for (before, after), levels in zip(plugin.seen, plugin.levels_seen, strict=True):
        for number, level in enumerate(levels[:-1]):
            inside = next(asked)
            assert not inside.training
            assert torch.equal(inside.sigma, level)
            assert torch.equal(inside.t, 1000 * level)
            s = level.view(-1, 1, 1, 1, 1)
            on_path = (1 - s) * before.x0 + s * before.eps
            if number == 0:
                assert torch.equal(inside.x_t, on_path)
            steps += 1
        trained = next(asked)
        assert trained.training
        assert torch.equal(trained.x_t, after.x_t)
        assert torch.equal(trained.t, before.t)
    assert steps >= STEPS
    assert plugin._rolled is None, "nothing is kept for longer than its step"


def test_each_micro_step_and_rank_draws_its_own_plan(make_run):
    current = make_run(train_batch_size=64)
    plugin = ScheduledSampling(ScheduledSamplingSettings(**ON))
    moments = [Moment(1), Moment(1, micro=1), Moment(1, rank=1), Moment(2)]
    found = [plugin.counts(current, 64, moment) for moment in moments]
    again = [plugin.counts(current, 64, moment) for moment in moments]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for number, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[number + 1 :])


def test_evaluation_never_rolls_anything_out(world: Path):
    """O-R10: the held-out loss of the same weights, before training and with the plugin on."""
    keys = {"eval_steps_interval": 10, "learning_rate": 1e-30}
    plain = run(world, keys=keys, plugins={}, output="eval without", num_held_out=2)
    done = run(world, keys={**ON, **keys}, output="eval with", num_held_out=2)

    def held_out(finished):
        return [e for e in finished.events if e["kind"] == "eval"]

    assert held_out(done) == held_out(plain)
    assert len(held_out(done)) > 1
    assert done.steps != plain.steps


def test_the_anti_drift_term_acts_on_rolled_samples_alone(world: Path):
    done = run(
        world,
        keys={
            **ON,
            "scheduled_sampling_reflexflow": True,
            "scheduled_sampling_reflexflow_beta1": 3.0,
        },
        output="reflex",
    )
    plugin, some = done.plugin("scheduled_sampling"), 0
    for (term, output), levels in zip(plugin.terms, plugin.levels_seen, strict=True):
        rolled = levels[0] > levels[-1]
        assert not term.value[~rolled].any()
        v, d = output.prediction.flatten(1), (output.inputs.x_t - output.inputs.x0).flatten(1)
        apart = v / v.norm(dim=1, keepdim=True) - d / d.norm(dim=1, keepdim=True)
        expected = 3.0 * apart.square().sum(1)
        torch.testing.assert_close(term.value[rolled], expected[rolled], atol=1e-5, rtol=1e-5)
        some += int(rolled.sum())
    assert some


def test_a_resumed_run_ends_with_the_same_bits(world: Path):
    keys = {**ON, "scheduled_sampling_ramp_steps": 4, "scheduled_sampling_sampler": "heun"}
    whole = run(world, keys=keys, output="whole")
    with pytest.raises(Interrupted):
        run(world, keys=keys, output="cut", crash_at=4)
    done = run(world, keys=keys, output="cut")
    assert done.weights() == whole.weights()
    assert done.steps == whole.steps


def test_a_resume_with_another_grid_is_refused(world: Path):
    with pytest.raises(Interrupted):
        run(world, output="grid", crash_at=4)
    keys = {**ON, "validation_num_inference_steps": 7}
    with pytest.raises(CheckpointError, match=r"30 steps.*validation_num_inference_steps.*7 steps"):
        run(world, keys=keys, output="grid")


def test_all_ranks_take_the_same_number_of_steps(make_run):
    """Each rank knows what the others drew; its own samples that take fewer steps wait."""
    plugin = ScheduledSampling(ScheduledSamplingSettings(**ON))
    plugin._grid = torch.linspace(1, 0, 31)
    lengths, drawn = [], []
    for rank in range(3):
        current = make_run(rank=rank)
        current.world_size = 3
        current.spec = ModelSpec("m", 16, 4, 16, (4, 16, 16), (Expert("transformer"),))
        found = []
        for step in range(1, 40):
            zeros = torch.zeros(2, 1, 1, 1, 1)
            inputs = ModelInputs(
                x0=zeros, eps=zeros, sigma=torch.tensor([0.4, 0.6]), t=zeros, x_t=zeros, target=zeros,
                loss_weight=zeros, conditioning={}, role="transformer", moment=Moment(step, 0, rank),
            )  # fmt: skip
            found.append(len(plugin.levels(current, inputs)))
            drawn.append(tuple(plugin.counts(current, 2, inputs.moment).tolist()))
        lengths.append(found)
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(set(lengths[0])) > 2
    assert len(set(drawn)) > 4, "ranks and steps draw differently"


def test_token_wise_noise_levels_are_refused(make_run):
    plugin = ScheduledSampling(ScheduledSamplingSettings(**ON))
    zeros = torch.zeros(2, 1, 1, 1, 1)
    inputs = ModelInputs(
        x0=zeros, eps=zeros, sigma=torch.zeros(2, 9), t=zeros, x_t=zeros, target=zeros,
        loss_weight=zeros, conditioning={}, role="transformer", moment=Moment(1),
    )  # fmt: skip
    with pytest.raises(Exception, match="one noise level each"):
        plugin.prepare_inputs(make_run(), inputs)


def test_what_it_does_is_said_in_one_line(world: Path):
    done = run(world, keys={**ON, "scheduled_sampling_max_step_offset": 1}, output="said")
    lines = [line for line in done.said if line.startswith("scheduled_sampling rolls")]
    # P(one of two is rolled) = 1 - .4^2 = .84 forwards on top of three
    assert lines == [
        "scheduled_sampling rolls 60% of the samples out over 1 to 1 of 30 sampling steps (euler); "
        "0.8 predictions more a micro-batch, so a step takes about 1.3 times as long"
    ]


def test_keys_without_effect_are_told_and_nonsense_is_refused(world: Path):
    done = run(world, keys={**ON, "scheduled_sampling_prob_start": 0.1}, output="idle")
    assert (
        "scheduled_sampling_prob_start has no effect: scheduled_sampling_ramp_steps is 0"
        in done.said
    )
    for keys, words in (
        ({"scheduled_sampling_max_step_offset": 3}, "scheduled_sampling_probability"),
        ({**ON, "scheduled_sampling_order": 2}, "unipc"),
        ({**ON, "scheduled_sampling_sampler": "dpm"}, "unipc"),
        ({}, "is not set, but scheduled_sampling is in the run"),
    ):
        refused = attempt(
            world, plugins={"scheduled_sampling": Watched}, settings=keys, output="refused"
        )
        assert isinstance(refused.error, ConfigError)
        assert words in str(refused.error)


def test_the_ramp_starts_at_zero_unless_told_and_zero_means_zero():
    settings = ScheduledSamplingSettings(**ON, scheduled_sampling_ramp_steps=10)
    assert settings.ends == (0.0, 0.6)
    told = {**ON, "scheduled_sampling_ramp_steps": 10, "scheduled_sampling_prob_start": 0.0}
    assert ScheduledSamplingSettings(**told, scheduled_sampling_prob_end=0.2).ends == (0.0, 0.2)
    plugin = ScheduledSampling(ScheduledSamplingSettings(**told))
    assert plugin.probability(5) == pytest.approx(0.3)
    assert plugin.probability(0) == 0.0


def test_prepare_inputs_makes_new_values(world: Path):
    done = run(world, keys={**ON, "scheduled_sampling_probability": 1.0}, output="new")
    for before, after in done.plugin("scheduled_sampling").seen:
        again = replace(before)
        assert again.x_t is before.x_t
        s = before.sigma.view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(before.x_t, (1 - s) * before.x0 + s * before.eps)
        assert after.x_t is not before.x_t
