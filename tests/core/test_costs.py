"""What each plugin costs is measured for any plugin, now and then, and changes no bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer_core import LossTerm, Moment, PluginInfo, Route, hookimpl
from trainer_core.costs import Costs, readable
from trainer_core.testing.harness import Finished, train

STEPS = 6


class Weigher:
    """Makes a new x_t of its own, and a loss that keeps a known number of bytes."""

    info = PluginInfo(summary="Weighs")

    def __init__(self, settings) -> None:
        self.made = 0

    @hookimpl
    def prepare_inputs(self, inputs):
        changed = inputs.x_t.clone()
        self.made = changed.nbytes
        return replace(inputs, x_t=changed)

    @hookimpl
    def compute_loss(self, output):
        return LossTerm("weigher", output.prediction.square().flatten(1).mean(1))


class Idle:
    info = PluginInfo(summary="Has nothing to do in a step")

    def __init__(self, settings) -> None:
        pass


class Router:
    info = PluginInfo(summary="Routes")

    def __init__(self, settings) -> None:
        pass

    @hookimpl
    def route_tokens(self, run):
        def keep(num_samples, num_tokens, moment):
            return torch.arange(num_tokens // 2).expand(num_samples, -1)

        return Route("router", 1, 1, keep)


PLUGINS = {"weigher": Weigher, "idle": Idle, "router": Router}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs")


def run(world: Path, interval: int, output: str, plugins=PLUGINS) -> Finished:
    keys = {"max_train_steps": STEPS, "log_step_interval": interval}
    return train(world, plugins=plugins, settings=keys, output=output)


@pytest.fixture(scope="module")
def often(world: Path) -> Finished:
    return run(world, 2, "often")


def timings(finished: Finished) -> list[dict]:
    lines = (finished.folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "timing"]


def test_bytes_are_those_made_and_kept(often: Finished):
    made = often.plugin("weigher").made  # x_t: (2, 4, 2, 4, 4) float32
    assert made == 2 * 4 * 2 * 4 * 4 * 4
    # prepare_inputs: x_t; compute_loss: the prediction that the square keeps, and (2,) float32
    last = timings(often)[-1]
    assert last["cost/weigher/bytes"] == made + made + 2 * 4
    assert last["cost/router/bytes"] == 2 * 4 * 8
    assert 0 < last["cost/weigher/s"] < last["s_per_step"]
    assert not any(name.startswith(("cost/idle", "cost/flow", "cost/tiny")) for name in last)


def test_the_end_of_a_run_says_it(often: Finished):
    said = list(often.said)
    start = next(k for k, line in enumerate(said) if line.startswith("What each plugin cost"))
    assert "(3 sampled)" in said[start]
    assert said[start + 1].split()[0] == "router"
    assert said[start + 1].endswith("(the draw; what it does inside the forward is in the step)")
    assert said[start + 2].split()[0] == "weigher"
    assert said[start + 2].endswith("2.06 kB")


def test_a_short_run_is_measured_at_its_last_step(world: Path):
    assert any("(1 sampled)" in line for line in run(world, 1000, "rarely").said)


def test_measuring_changes_no_bit(world: Path, often: Finished):
    rarely = run(world, 1000, "never")
    assert rarely.weights() == often.weights()
    assert rarely.steps == often.steps


def test_nothing_is_said_where_no_plugin_has_a_part(world: Path):
    done = run(world, 2, "idle", plugins={"idle": Idle})
    assert not any("What each plugin cost" in line for line in done.said)


def test_only_sampled_steps_are_measured():
    costs, calls = Costs(), []
    call = costs.around("one", "prepare_inputs", lambda **given: calls.append(given))
    call(inputs=None)
    assert not costs.by_plugin
    costs.on = True
    call(inputs=None)
    costs.step_done(0.5)
    call(inputs=None)
    assert len(calls) == 3
    assert costs.scalars()["cost/one/s"] == costs.by_plugin["one"].seconds
    route = costs.route(Route("two", 0, 0, lambda *given: torch.zeros(1, 3)))
    assert route.keep(1, 3, Moment(1)).shape == (1, 3)
    assert "two" not in costs.by_plugin
    other = costs.around("one", "validate", print)
    assert other is print


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1540, "1.54 kB"), (2.5e6, "2.5 MB"), (8e9, "8 GB"), (8e13, "8e+04 GB")],
)  # fmt: skip
def test_bytes_can_be_read(num_bytes, text):
    assert readable(num_bytes) == text
