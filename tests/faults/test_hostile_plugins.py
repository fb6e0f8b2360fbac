"""Broken and hostile plugins in the real loop: named where they fail, contained where possible."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from faults.hostile import Hostile, answering, hostile, raising

from trainer_core import (
    Artifact,
    EncodedTensor,
    Encoder,
    LossTerm,
    ParameterGroup,
    PluginError,
    PluginInfo,
    Route,
    TrainerError,
    hookimpl,
)
from trainer_core.blame import notes
from trainer_core.hookspecs import WRAPPABLE
from trainer_core.testing.harness import Finished, attempt, train

KEYS = {
    "max_train_steps": 3,
    "checkpoint_step_interval": 2,
    "validation_prompt": "a prompt",
    "validation_step_interval": 1,
    "disable_benchmark": True,
    "tiny_layers": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture
def go(folder, request):
    """Run with a hostile plugin in an output folder of its own; the cache is shared."""

    def call(
        where: str, fault: Callable[..., Any], run: Callable[..., Finished] = attempt, **keys: Any
    ) -> Finished:
        output = f"out-{abs(hash(request.node.name))}"
        plugins = {"hostile": hostile(where, fault)}
        return run(folder, plugins=plugins, settings={**KEYS, **keys}, output=output)

    return call


def told(finished: Finished) -> str:
    """Return what a user sees of the error that ended a run."""
    assert finished.error is not None, finished.said
    return "\n".join([str(finished.error), *notes(finished.error)])


SET_UP = ("describe_model", "load_model", "route_tokens", "build_optimizer")
STEP = ("prepare_inputs", "compute_loss", "save_weights")
METHODS = ("attach", "encoders", "parameters", "state_dict")


@pytest.mark.parametrize("where", [*SET_UP, *STEP, *METHODS])
def test_a_plugin_that_raises_is_named_with_its_hook(where, go):
    finished = go(where, raising)
    assert isinstance(finished.error, ZeroDivisionError)
    kind = "method" if where in METHODS else "hook"
    assert f"in plugin 'hostile', {kind} {where}" in told(finished)


@pytest.mark.parametrize("phase", ["None", "cache", "forward", "backward", "update", "save"])
def test_a_phase_that_raises_is_named(phase, go):
    assert "in plugin 'hostile', hook offload" in told(go(f"offload:{phase}", raising))


def test_encoding_that_raises_is_named(go, tmp_path):
    keys = {"cache_dir": str(tmp_path / "cache")}
    assert "in plugin 'hostile', hook encode_batch" in told(go("encode_batch", raising, **keys))


@pytest.mark.parametrize("where", ["load_weights", "load_state_dict"])
def test_a_resume_that_raises_is_named(where, go):
    assert go("nothing", raising, max_train_steps=2).error is None
    finished = go(where, raising)
    kind = "hook" if where == "load_weights" else "method"
    assert f"in plugin 'hostile', {kind} {where}" in told(finished)


def test_what_was_returned_at_set_up_is_named_when_it_raises_later(go):
    route = Route("hostile", 0, 0, lambda *_: raising(None))
    finished = go("route_tokens", answering(route))
    assert "in plugin 'hostile'" in told(finished)


def test_a_plugin_that_ends_the_process_ends_the_run_with_an_error(go):
    def leave(plugin, **facts):
        raise SystemExit(0)

    finished = go("compute_loss", leave)
    assert isinstance(finished.error, PluginError)
    assert "'hostile' ended the process in hook compute_loss" in told(finished)


# --- wrong answers ---------------------------------------------------------------------------------


def term(value: Any, name: str = "hostile", **metrics: Any) -> Callable[..., Any]:
    return answering(LossTerm(name, value, metrics))


def inputs(**changes: Any) -> Callable[..., Any]:
    return lambda plugin, inputs: dataclasses.replace(inputs, **changes)


def frames(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.zeros(shape, dtype)


OK = torch.zeros(2)
ENCODER = Encoder("hostile.x", "caption", (EncodedTensor("x"),), dict, lambda: None)
WRONG = {
    "a number for a spec": ("describe_model", answering(3), "describe_model", "ModelSpec"),
    "a number for a model": ("load_model", answering(3), "load_model", "Model"),
    "a number for a route": ("route_tokens", answering(3), "route_tokens", "Route"),
    "a route of another": (
        "route_tokens", answering(Route("flow", 0, 0, lambda *_: OK)), "route_tokens", "own name",
    ),
    "a route past the end": (
        "route_tokens", answering(Route("hostile", 0, 9, lambda *_: OK)), "hostile", "2 blocks",
    ),
    "ids of a wrong shape": (
        "route_tokens", answering(Route("hostile", 0, 0, lambda *_: torch.zeros(3).long())),
        "hostile", "must keep ids of shape (2,",
    ),
    "ids of a wrong dtype": (
        "route_tokens", answering(Route("hostile", 0, 0, lambda n, *_: torch.zeros(n, 1))),
        "hostile", "int64",
    ),
    "ids out of range": (
        "route_tokens", answering(Route("hostile", 0, 0, lambda n, *_: torch.full((n, 1), 10**6))),
        "hostile", "ascending ids from 0",
    ),
    "a number for a residency": ("offload:None", answering(3), "offload", "Residency"),
    "a number for a phase": ("offload:forward", answering(3), "offload", "context manager"),
    "a word for an optimiser": ("build_optimizer", answering("adam"), "build_optimizer", "optimiser"),
    "nothing for inputs": ("prepare_inputs", answering(None), "prepare_inputs", "NoneType"),
    "inputs of a wrong shape": (
        "prepare_inputs", inputs(x_t=torch.zeros(1)), "prepare_inputs", "x_t must stay (2, 4,",
    ),
    "inputs of a wrong dtype": (
        "prepare_inputs", lambda plugin, inputs: dataclasses.replace(
            inputs, target=inputs.target.half()
        ), "prepare_inputs", "target must stay",
    ),
    "no tensor for a weight": (
        "prepare_inputs", inputs(loss_weight=1.0), "prepare_inputs", "loss_weight must stay (2,)",
    ),
    "a number for a term": ("compute_loss", answering(0.5), "compute_loss", "LossTerm"),
    "a float in a term": ("compute_loss", term(0.5), "hostile", "value must be a tensor"),
    "a term of a wrong shape": ("compute_loss", term(torch.zeros(())), "hostile", "(2,) float32"),
    "a term of a wrong dtype": ("compute_loss", term(OK.double()), "hostile", "torch.float64"),
    "a term of another's name": ("compute_loss", term(OK, "flow"), "hostile", "begin with 'hostile/"),
    "a metric of many numbers": ("compute_loss", term(OK, loss=OK), "hostile", "must be one number"),
    "a term that is not a number": (
        "compute_loss", term(OK * float("nan")), "hostile", "is not finite",
    ),
    "inputs that are not numbers": (
        "prepare_inputs", lambda plugin, inputs: dataclasses.replace(
            inputs, target=inputs.target * float("inf")
        ), "flow", "is not finite",
    ),
    "a number for encoders": ("encoders", answering(3), "encoders", "list of Encoder"),
    "another's output": (
        "encoders", answering([dataclasses.replace(ENCODER, writes=(EncodedTensor("latents"),))]),
        "'tiny'", "latents",
    ),
    "a name for parameters": ("parameters", answering(["w"]), "parameters", "ParameterGroup"),
    "tensors for parameters": (
        "parameters", answering([ParameterGroup("x", [("w", torch.zeros(1))])]), "parameters",
        "nn.Parameter",
    ),
    "a list for a state": ("state_dict", answering([1]), "state_dict", "JSON-able"),
    "a function in a state": ("state_dict", answering({"f": print}), "state_dict, 'f'", "JSON-able"),
    "a word for files": ("save_weights", answering("w.safetensors"), "save_weights", "file names"),
    "files that are not there": ("save_weights", answering(["w"]), "hostile", "no such file"),
    "files elsewhere": ("save_weights", answering(["../../clips"]), "hostile", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_a_wrong_answer_is_refused_with_plugin_and_hook(name, go):
    where, fault, *words = WRONG[name]
    finished = go(where, fault)
    assert isinstance(finished.error, TrainerError), finished.error
    text = told(finished)
    assert [word for word in words if word not in text] == [], text
    assert "hostile" in text or words[0] == "flow"


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda samples: 3, "encode_batch"),
        (lambda samples: [{"x": 3}] * len(samples), "encode_batch"),
        (lambda samples: [], "returned 0 results"),
        (lambda samples: [{}] * len(samples), "declared ['x']"),
        (lambda samples: [{"x": OK / 0}] * len(samples), "NaN or infinite"),
    ],
)
def test_a_wrong_encoding_is_refused(answer, word, folder):
    class Encodes(Hostile):
        def encoders(self, run):
            return [ENCODER]

        @hookimpl
        def encode_batch(self, encoder, samples):
            return answer(samples) if encoder.name == ENCODER.name else None

    finished = attempt(folder, plugins={"hostile": Encodes}, settings=KEYS, output="encodes")
    assert isinstance(finished.error, PluginError)
    assert "hostile" in told(finished)
    assert word in told(finished)


# --- contained -------------------------------------------------------------------------------------

SAMPLES = {
    "raising": raising,
    "no list": answering(3),
    "no clip": answering([Artifact("a", frames(3, 3), 16.0)]),
    "no bytes": answering([Artifact("a", frames(5, 32, 32, 3, dtype=np.float32), 16.0)]),
    "no frames": answering([Artifact("a", frames(0, 32, 32, 3), 16.0)]),
    "a name that climbs": answering([Artifact("../../../up", frames(5, 32, 32, 3), 16.0)]),
    "a name from the root": answering([Artifact("/tmp/up", frames(5, 32, 32, 3), 16.0)]),
    "no rate": answering([Artifact("a", frames(5, 32, 32, 3), 0.0)]),
}


@pytest.mark.parametrize("name", SAMPLES, ids=lambda name: name.replace(" ", "-"))
def test_samples_that_fail_are_named_and_training_goes_on(name, go, folder):
    finished = go("validate", SAMPLES[name], train)
    assert finished.code == 0
    assert [event["step"] for event in finished.steps] == [1, 2, 3]
    failed = [line for line in finished.said if "is left out; training goes on" in line]
    assert len(failed) == 3  # one for each step, and nothing else stops
    assert any("hostile" in line for line in finished.said)
    assert not list(folder.glob("*up*"))


def test_a_phase_of_validation_that_fails_is_contained(go):
    finished = go("offload:validate", raising, train)
    assert len(finished.steps) == 3
    assert any("in plugin 'hostile', hook offload" in line for line in finished.said)


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(go):
    finished = go("track", raising, train)
    assert len(finished.steps) == 3
    lines = [line for line in finished.said if "tracker hostile failed" in line]
    assert len(lines) == 1
    assert "training goes on. ZeroDivisionError: hostile" in lines[0]


def test_wrong_answers_of_a_tracker_mean_nothing(go):
    assert len(go("track", answering(3), train).steps) == 3


# --- random numbers and memory ---------------------------------------------------------------------


def draw_globally(plugin: Hostile, **facts: Any) -> Any:
    import random

    random.random()
    np.random.rand(3)
    torch.rand(facts["batch"].moment.step)


def test_global_draws_change_no_draw_of_core_and_no_number(go, folder):
    quiet = train(folder, plugins={"hostile": hostile("nothing", raising)}, settings=KEYS,
                  output="quiet")  # fmt: skip
    loud = go("compute_loss", draw_globally, train)
    assert loud.draws == quiet.draws
    assert loud.steps == quiet.steps
    assert loud.weights() == quiet.weights()


def test_core_keeps_no_output_and_a_plugin_that_does_is_seen(go):
    refs: list[Any] = []
    alive: list[int] = []

    def watch(plugin, output, **facts):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(output.prediction))

    def keep(plugin, output, **facts):
        plugin.kept.append(output)
        watch(plugin, output)

    go("compute_loss", watch, train)
    assert alive == [0, 0, 0]
    refs.clear()
    alive.clear()
    go("compute_loss", keep, train, resume_from_checkpoint="none")
    assert alive == [0, 1, 2]


# --- what the host refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("hook", sorted(WRAPPABLE))
def test_a_wrapper_that_swallows_the_result_is_an_error(hook, folder):
    def swallow(self):
        yield

    wrapper = hookimpl(wrapper=True)(swallow)
    plugin = type(
        "Wrapper", (), {"info": PluginInfo(), hook: wrapper, "__init__": lambda s, k: None}
    )
    finished = attempt(folder, plugins={"hostile": plugin}, settings=KEYS, output=f"swallow-{hook}")
    text = "\n".join([*finished.said, str(finished.error)])
    assert "load_model returned NoneType" in text or "training goes on" in text
    assert "hostile" in text


def test_a_parameter_that_is_the_models_own_is_refused(folder):
    class Steals(Hostile):
        def attach(self, run):
            self.own = next(iter(run.model.modules["transformer"].parameters()))

        def parameters(self):
            return [ParameterGroup("hostile", [("w", self.own)])]

    stolen = attempt(folder, plugins={"hostile": Steals}, settings=KEYS, output="st")
    assert isinstance(stolen.error, PluginError), stolen.error
    assert "hostile" in told(stolen)
    assert "trained already" in told(stolen)
