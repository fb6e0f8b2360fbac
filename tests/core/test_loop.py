"""The life cycle of a run: which hooks are called when, and what plugins may do in it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import (
    LossTerm,
    ParameterGroup,
    PluginInfo,
    PluginSettings,
    Residency,
    Route,
    hookimpl,
    key,
)
from trainer_core.testing.harness import Interrupted, attempt, train
from trainer_core.testing.recorder import HookRecorder
from trainer_core.testing.tiny import Tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture
def out(request: pytest.FixtureRequest) -> str:
    return request.node.name


class Idle:
    info = PluginInfo(summary="does nothing")

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings
        self.seen: list[Any] = []


def test_the_life_cycle_of_two_steps(folder: Path, out: str):
    recorder = HookRecorder()
    keys = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "validation_prompt": "x"}
    keys |= {"validation_step_interval": 2}
    train(folder, plugins={}, settings=keys, output=out, recorder=recorder)
    micro = ["prepare_inputs", "offload:forward", "compute_loss", "offload:backward"]
    step = [*micro, *micro, "offload:update"]
    render, save = ["offload:validate", "validate"], ["offload:save", "save_weights"]
    called = [name for name in recorder.names() if "encode" not in name]
    assert called == [
        *("describe_model", "offload:cache", "load_model", "route_tokens", "offload:set-up"),
        *("build_optimizer", *render, *step, *step, *save, *render),
        *("offload:save", "save_weights:final"),
    ]
    recorder.assert_order(["offload:cache", "encode_batch", "load_model"])


def test_the_recorder_tells_what_was_not_called(folder: Path, out: str):
    recorder = HookRecorder()
    train(folder, plugins={}, settings={"max_train_steps": 1}, output=out, recorder=recorder)
    recorder.assert_order(["load_model", "compute_loss", "save_weights:final"])
    with pytest.raises(AssertionError, match="load_model was not called after compute_loss"):
        recorder.assert_order(["compute_loss", "load_model"])


def test_two_micro_batches_equal_one_of_twice_the_size(folder: Path):
    """The same four noised clips in one batch or in two: the same gradient, up to rounding."""

    class Fixed(Idle):
        """Takes noise and sigma from the clip's name, so that grouping changes neither."""

        @hookimpl
        def compute_loss(self, batch, output):
            return None

        @hookimpl
        def prepare_inputs(self, inputs):
            sums = inputs.x0.double().flatten(1).sum(1)
            eps = torch.stack([torch.full(inputs.x0.shape[1:], float(s) % 1.0) for s in sums])
            sigma = torch.full_like(inputs.sigma, 0.5)
            x_t, target = (inputs.x0 + eps) / 2, eps - inputs.x0
            return replace(inputs, eps=eps, sigma=sigma, t=1000 * sigma, x_t=x_t, target=target)

    keys = {"caption_dropout_probability": 0.0, "max_train_steps": 1, "max_grad_norm": 0}

    def run(output: str, size: int, parts: int) -> Any:
        more = {"train_batch_size": size, "gradient_accumulation_steps": parts}
        return train(folder, plugins={"fixed": Fixed}, settings=keys | more, output=output)

    one, two = run("one", 4, 1), run("two", 2, 2)
    assert {s for d in one.draws for s in d.samples} == {s for d in two.draws for s in d.samples}
    for name in ("loss", "flow", "grad_norm"):
        assert one.steps[0][name] == pytest.approx(two.steps[0][name], rel=1e-5)
    other = run("other", 2, 1)  # half of the clips: the comparison can fail
    assert other.steps[0]["grad_norm"] != pytest.approx(one.steps[0]["grad_norm"], rel=1e-3)


class Chained(Idle):
    @hookimpl
    def prepare_inputs(self, inputs):
        names = inputs.conditioning.get("names", ())
        conditioning = {**inputs.conditioning, "names": (*names, type(self).__name__)}
        return replace(inputs, conditioning=conditioning)


class First(Chained):
    info = PluginInfo(summary="first", after=())


class Second(Chained):
    info = PluginInfo(summary="second", after=("zeta",))

    @hookimpl
    def compute_loss(self, output):
        self.seen.append(output.inputs.conditioning["names"])
        return None


def test_the_chain_follows_after_and_not_the_order_of_names(folder: Path, out: str):
    plugins = {"alpha": Second, "zeta": First}
    done = train(folder, plugins=plugins, settings={"max_train_steps": 1}, output=out)
    assert done.plugin("alpha").seen == [("First", "Second")]


class Inside(Idle):
    """A route over the middle blocks, a tap behind block 2, and a residency, all watched."""

    info = PluginInfo(summary="acts inside the forward")

    def attach(self, run):
        self.index = run.request_tap(-2)
        self.drawn: list[tuple[int, int, int]] = []
        self.tapped: list[tuple[int, Any]] = []
        self.visits: list[tuple[str, int, str]] = []
        self.alone: list[set[int]] = []

    @hookimpl
    def route_tokens(self, run):
        def keep(num_samples, num_tokens, moment):
            self.drawn.append((num_samples, num_tokens, moment.step))
            return torch.arange(num_tokens // 2).expand(num_samples, -1)

        return Route("inside", 1, 2, keep)

    @hookimpl
    def offload(self, run, phase):
        if phase is not None:
            return None
        return Residency(
            "inside",
            ("transformer.blocks",),
            before=lambda index, phase: self.visits.append(("before", index, phase)),
            after=lambda index, phase: self.visits.append(("after", index, phase)),
        )

    @hookimpl
    def compute_loss(self, run, output):
        tap = output.taps[self.index]
        self.tapped.append((tuple(tap.tokens.shape), None if tap.ids is None else tap.ids.tolist()))
        before = len(self.drawn)
        run.predict(output.inputs)
        assert len(self.drawn) == before, "run.predict draws no route"
        return None


def test_routes_taps_and_residency_act_in_training_alone(folder: Path, out: str):
    keys = {"max_train_steps": 2, "eval_steps_interval": 1, "validation_prompt": "x"}
    keys |= {"validation_step_interval": 1}
    plugins = {"inside": Inside}
    done = train(folder, plugins=plugins, settings=keys, output=out, num_held_out=1)
    inside = done.plugin("inside")
    assert inside.drawn == [(2, 8, 1), (2, 8, 2)], "once per micro-step, never in evaluation"
    assert inside.index == 2
    assert inside.tapped == [((2, 4, 32), [[0, 1, 2, 3]] * 2)] * 2
    steps = [visit for visit in inside.visits if visit[2] == "backward"]
    once = [(when, block, "backward") for block in (3, 2, 1, 0) for when in ("before", "after")]
    assert steps == once * 2
    forward = [visit for visit in inside.visits if visit[2] == "forward"]
    assert forward[:8] == [(w, b, "forward") for b in range(4) for w in ("before", "after")]
    assert sum(e["kind"] == "eval" for e in done.events) == 3


class Onion(Idle):
    @hookimpl
    def offload(self, run, phase):
        if phase is None:
            return None

        @contextmanager
        def layer():
            PHASES.append(f"{type(self).__name__} in {phase}")
            yield
            PHASES.append(f"{type(self).__name__} out {phase}")

        return layer()


class Outer(Onion):
    info = PluginInfo(summary="outer", after=("inner",))


class Inner(Onion):
    pass


PHASES: list[str] = []


def test_phases_are_entered_as_an_onion(folder: Path, out: str):
    PHASES.clear()
    plugins = {"inner": Inner, "outer": Outer}
    train(folder, plugins=plugins, settings={"max_train_steps": 1}, output=out)
    open_layers: list[str] = []
    for line in PHASES:
        name, way, phase = line.split()
        if way == "in":
            open_layers.append(f"{name} {phase}")
        else:
            assert open_layers.pop() == f"{name} {phase}"
    assert open_layers == []
    phases = {line.split()[2] for line in PHASES}
    assert phases >= {"cache", "forward", "backward", "update", "save"}


class OwnSettings(PluginSettings):
    own_rate: float = key(0.01, "Learning rate of its scale.", gt=0)


class Own(Idle):
    info = PluginInfo(summary="trains a scale of its own", settings=OwnSettings)

    def attach(self, run):
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.count = 0

    def parameters(self):
        return [ParameterGroup("own", [("scale", self.scale)], self.settings.own_rate)]

    @hookimpl
    def compute_loss(self, output):
        self.count += 1
        per_sample = output.prediction.detach().flatten(1).mean(1, keepdim=True)
        return LossTerm("own", ((per_sample - self.scale) ** 2).mean(1))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_parameters_of_a_plugin_are_trained_saved_and_resumed_but_never_averaged(folder: Path):
    keys = {"use_ema": True, "max_grad_norm": 0, "own_rate": 0.02, "max_train_steps": 4}
    through = train(folder, plugins={"own": Own}, settings=keys, output="own")
    scale = through.plugin("own").scale.detach()
    # AdamW moves each element by about its learning rate while the gradient keeps its sign
    assert torch.allclose(scale, torch.full((3,), 1 - 4 * 0.02), atol=5e-3)
    saved = list((through.folder / "checkpoint-4").rglob("*.safetensors"))
    from safetensors import safe_open

    holding = set()
    for path in saved:
        with safe_open(path, "pt") as file:
            if any("scale" in name for name in file.keys()):  # noqa: SIM118  # no mapping
                holding.add(path.name)
    assert "plugin_parameters.safetensors" in holding
    assert "ema.safetensors" not in holding
    with pytest.raises(Interrupted):
        train(folder, plugins={"own": Own}, settings=keys, output="own-cut", crash_at=4)
    resumed = train(folder, plugins={"own": Own}, settings=keys, output="own-cut")
    assert torch.equal(resumed.plugin("own").scale, scale)
    assert resumed.plugin("own").count == 4
    assert resumed.events == through.events
    assert resumed.weights() == through.weights()


def term(name: str, value: Any) -> type:
    class Term(Idle):
        @hookimpl
        def compute_loss(self, batch):
            return value(batch.latents) if callable(value) else value

    return type(name, (Term,), {})


def changed(result: Any) -> type:
    class Changed(Idle):
        @hookimpl
        def prepare_inputs(self, inputs):
            return result

    return Changed


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (term("A", lambda x: LossTerm("mine", x.mean())), "must be (2,) float32"),
        (term("B", lambda x: LossTerm("mine", x.flatten(1).mean(1).double())), "torch.float64"),
        (term("C", lambda x: LossTerm("other", x.flatten(1).mean(1))), "named a loss term 'other'"),
        (term("D", 3.0), "returned float from compute_loss"),
        (term("E", lambda x: LossTerm("mine", x.flatten(1).mean(1) * float("nan"))), "not finite"),
        (changed(None), "returned NoneType from prepare_inputs"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_plugin(folder: Path, plugin: type, words: str):
    failed = attempt(folder, plugins={"mine": plugin}, output="wrong-" + plugin.__name__)
    assert failed.error is not None
    assert words in str(failed.error)
    assert "mine" in str(failed.error)
    assert not list(failed.folder.glob("checkpoint-*")), "nothing was saved after it"


def test_loss_terms_are_summed_whatever_the_order_of_plugins(folder: Path):
    def constant(value: float) -> Any:
        return lambda x: LossTerm("one" if value == 1 else "two", x.new_full((x.shape[0],), value))

    plugins = {"one": term("One", constant(1.0)), "two": term("Two", constant(2.0))}
    done = train(folder, plugins=plugins, settings={"max_train_steps": 1}, output="terms")
    step = done.steps[0]
    assert step["loss"] == pytest.approx(step["flow"] + 3.0, rel=1e-6)
    assert (step["one"], step["two"]) == (1.0, 2.0)


class Frozen(Tiny):
    @hookimpl
    def load_model(self, run):
        model = super().load_model(run)
        model.modules["transformer"].requires_grad_(False)
        return model


def test_a_run_with_nothing_to_train_is_refused(folder: Path):
    failed = attempt(folder, plugins={"tiny": Frozen}, output="frozen")
    assert "no parameter to train" in str(failed.error)


class Thing(Tiny):
    @hookimpl
    def load_model(self, run):
        return object()


def test_what_is_no_model_is_refused(folder: Path):
    failed = attempt(folder, plugins={"tiny": Thing}, output="thing")
    for words in ("'tiny'", "load_model", "object", "Model (spec, modules, networks and predict"):
        assert words in str(failed.error)


class Dropping(Idle):
    """Draws as a dropout layer does: from torch's global generator."""

    @hookimpl
    def compute_loss(self, output):
        noise = torch.nn.functional.dropout(torch.ones(output.prediction.shape[0], 64), 0.5)
        return LossTerm("dropping", noise.mean(1))


def test_dropout_is_the_same_in_every_run_and_differs_between_steps(folder: Path):
    keys = {"gradient_accumulation_steps": 2, "max_train_steps": 3}

    def run(output: str, **more: Any) -> list[float]:
        plugins = {"dropping": Dropping}
        done = train(folder, plugins=plugins, settings=keys | more, output=output)
        return [event["dropping"] for event in done.steps]

    torch.manual_seed(1)
    first = run("drop-1")
    torch.manual_seed(2)
    assert run("drop-2") == first
    assert len(set(first)) == 3
    assert run("drop-3", seed=8) != first
