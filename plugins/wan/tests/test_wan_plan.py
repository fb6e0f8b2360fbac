"""What ``trainer plan`` foretells of the tiny Wan is what a real step of it takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer_core import PluginInfo, hookimpl
from trainer_core.catalogue import Catalogue
from trainer_core.flow import Flow
from trainer_core.optim import Optimizers
from trainer_core.planner import rehearse
from trainer_core.planner.auto import MARGIN, WAYS, settle
from trainer_core.planner.fit import Remedy, ladder, needed
from trainer_core.planner.live import LiveBytes, Operations, weights_of
from trainer_core.planner.report import as_json, lines, verdict
from trainer_core.plugins import build
from trainer_core.progress import Display
from trainer_core.session import prepare
from trainer_core.settings.load import resolve
from trainer_core.testing.harness import CORE, train, write_world
from trainer_wan.hooks import Wan
from trainer_wan.testing import write_checkpoint

lora = pytest.importorskip("trainer_lora.hooks")
umt5 = pytest.importorskip("trainer_umt5.hooks")

PLUGINS: Mapping[str, type] = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora}
EXACT = 0.005
"""Counted bytes of a rehearsal may differ from those of a real step by this share."""


class Weigher:
    """Weighs the second step of a real run, and counts its operations."""

    info = PluginInfo(summary="Weighs a step")

    def __init__(self, settings: Any) -> None:
        self.live: LiveBytes | None = None
        self.operations = Operations()
        self.peak = 0

    @hookimpl
    def prepare_inputs(self, run, inputs):
        if inputs.moment.step == 2:
            self.live = LiveBytes()
            self.live.know(weights_of(run.model.modules.values()))
            given = (inputs.x0, inputs.eps, inputs.x_t, inputs.target, inputs.sigma, inputs.t)
            self.live.know([*given, inputs.loss_weight, *inputs.conditioning.values()])
            self.live.restart()
            self.live.__enter__()
            self.operations.__enter__()
        elif self.live is not None and not self.peak:
            self.operations.__exit__(None, None, None)
            self.live.__exit__(None, None, None)
            self.peak = self.live.peak
        return inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_checkpoint(folder / "model", layers=3)
    return folder


def keys(world: Path, **more: Any) -> dict[str, Any]:
    return {
        **CORE, "model_type": "lora", "lora_rank": 4, "max_train_steps": 3, "use_ema": True,
        "pretrained_model_name_or_path": str(world / "model"), "plugins": list(PLUGINS),
        "data_backend_config": str(write_world(world)), "output_dir": str(world / "none"),
        "cache_dir": str(world / "none"), "checkpoint_step_interval": 100, **more,
    }  # fmt: skip


def foretold(world: Path, **more: Any) -> tuple[rehearse.Forecast, Any]:
    catalogue = Catalogue.of(dict(PLUGINS))
    resolved = resolve(keys(world, **more), environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    begun = prepare(resolved, host, display=Display.silent())
    return rehearse.forecast(begun.run, host), begun.run


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"train_batch_size": 1},
        {"model_type": "full", "plugins": ["wan", "umt5"]},
        {"optimizer": "optimi-lion"},
    ],
    ids=str,
)
def test_the_bytes_of_a_step_are_those_of_a_real_one(world: Path, tmp_path: Path, more):
    forecast, _ = foretold(world, **more)
    (training,) = (p for p in forecast.phases if p.name == "training")
    chosen = keys(world, **more)
    names = chosen.pop("plugins")
    del chosen["output_dir"]
    done = train(
        world, plugins={**PLUGINS, "weigher": Weigher}, named=[*names, "weigher"],
        settings=chosen, output=tmp_path.name,
    )  # fmt: skip
    weigher = done.plugin("weigher")
    apart = sum(training.parts.get(name, 0) for name in ("optimiser", "their averages"))
    assert training.num_bytes - apart == pytest.approx(weigher.peak, rel=EXACT)
    assert forecast.operations == weigher.operations.total


def test_nothing_is_read_or_written(world: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    for path in (world / "model").rglob("*.json"):
        target = bare / path.relative_to(world / "model")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert not list(bare.rglob("*.safetensors"))
    folders = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    forecast, _ = foretold(world, pretrained_model_name_or_path=str(bare), **folders)
    assert forecast.peak.num_bytes > 0
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was loaded or encoded"


def test_checkpointing_keeps_less_and_computes_more(world: Path):
    with_it, _ = foretold(world, gradient_checkpointing=True)
    without, _ = foretold(world, gradient_checkpointing=False)
    kept = [f.phases[-1].parts["kept for the backward pass"] for f in (with_it, without)]
    assert kept[0] < kept[1] / 2
    assert with_it.operations > 1.2 * without.operations


def test_a_known_flavour_needs_no_files(world: Path):
    forecast, run = foretold(
        world, pretrained_model_name_or_path=None, model_flavour="t2v-480p-1.3b-2.1",
        gradient_checkpointing=True, model_type="lora",
    )  # fmt: skip
    parts = {phase.name: phase.parts for phase in forecast.phases}
    assert parts["training"]["frozen weights"] == pytest.approx(1.42e9 * 4, rel=0.01)
    assert parts["encoding with umt5.text"]["weights"] == pytest.approx(5.68e9 * 4, rel=0.01)
    assert run.sketch is None


def test_the_ladder_tries_what_costs_least_first_and_skips_what_does_not_help(world: Path):
    begin, _ = foretold(world, gradient_checkpointing=False)
    less, _ = foretold(world, gradient_checkpointing=True)
    asked: list[Mapping[str, Any]] = []

    def forecast(values: Mapping[str, Any], encoders: bool) -> rehearse.Forecast | None:
        assert not encoders
        asked.append(values)
        return {"useless": begin, "refused": None}.get(next(reversed(values)), less)

    begin = dataclasses.replace(begin, phases=begin.phases[-1:])
    less = dataclasses.replace(less, phases=less.phases[-1:])
    remedies = [
        Remedy({"there": 1}, ""), Remedy({"other": 1}, "", ("encoding",)), Remedy({"refused": 1}, ""),
        Remedy({"useless": 1}, ""), Remedy({"helps": 1}, "cheap"), Remedy({"never": 1}, ""),
    ]  # fmt: skip
    rungs = list(
        ladder(
            begin, capacity=needed(less) + 1, forecast=forecast, remedies=remedies,
            current={"there": 1}.get,
        )
    )  # fmt: skip
    assert [rung.remedy.keys for rung in rungs] == [{"helps": 1}]
    assert asked == [{"refused": 1}, {"useless": 1}, {"helps": 1}]


def test_it_says_what_it_found(world: Path):
    found, run = foretold(world)
    text = "\n".join(lines(found, run, rate=1e12, measured=False))
    assert "5 frames of 32x32" in text
    assert "training" in text
    assert "encoding with umt5.text" in text
    json.dumps(as_json(found, rate=1e12))
    fits = "\n".join(verdict(found, vram=24, rungs=[]))
    assert fits.startswith("Fits 24 GiB")
    assert "Does not fit 0.1 GiB" in "\n".join(verdict(found, vram=0.1, rungs=[]))


def test_auto_takes_the_first_way_that_fits_and_the_last_where_none_does(world: Path):
    def prepared(values: Mapping[str, Any]) -> tuple[Any, Any]:
        catalogue = Catalogue.of(dict(PLUGINS))
        resolved = resolve(keys(world, **values), environ={}, catalogue=catalogue)
        return resolved, build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))

    sizes = {
        way.about: needed(f, [f.phases[-1]])
        for way in WAYS[:4]
        for f in [foretold(world, **way.keys)[0]]
    }
    order = list(sizes.values())
    assert order[0] > order[1] > order[3]
    chosen, sentence = settle(prepared, capacity=order[1] / (1 - MARGIN) + 1)
    assert chosen == WAYS[1].keys
    assert "feed-forwards are computed twice" in sentence
    chosen, sentence = settle(prepared, capacity=1)
    assert chosen == WAYS[3].keys, "host memory is no way out without a card"
    assert "is the least and needs" in sentence
