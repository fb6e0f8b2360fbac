"""Every name trains and resumes bit for bit on the CPU; what is refused, and what is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_bitsandbytes import BitsAndBytes
from trainer_bitsandbytes.optimizers import KINDS, SMALLEST, moments, page_again
from trainer_core import ConfigError
from trainer_core.errors import CheckpointError
from trainer_core.files import read_tensors
from trainer_core.testing.harness import Finished, Interrupted, attempt, train

pytest.importorskip("bitsandbytes")
PLUGINS = {"bitsandbytes": BitsAndBytes}
SMALL = "min_8bit_size=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bitsandbytes")


def run(folder: Path, name: str, output: str, **more: Any) -> Finished:
    crash = more.pop("crash_at", None)
    keys = {"optimizer": name, "optimizer_config": SMALL, "max_train_steps": 4, **more}
    return train(folder, plugins=PLUGINS, settings=keys, output=f"{name}-{output}", crash_at=crash)


@pytest.mark.parametrize("name", KINDS)
def test_each_trains_and_a_killed_run_ends_with_the_same_bits(folder: Path, name: str):
    whole = run(folder, name, "whole")
    assert whole.steps[-1]["loss"] < whole.steps[0]["loss"]
    with pytest.raises(Interrupted):
        run(folder, name, "killed", crash_at=4)
    resumed = run(folder, name, "killed")
    assert resumed.events == whole.events
    assert resumed.weights() == whole.weights()
    last = [
        read_tensors(done.folder / "checkpoint-4" / "optimizer.safetensors")
        for done in (whole, resumed)
    ]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_moments_are_saved_in_8_bits(folder: Path):
    done = run(folder, "bnb-lion8bit", "moments")
    saved = read_tensors(done.folder / "checkpoint-4" / "optimizer.safetensors")
    kinds = {value.dtype for key, value in saved.items() if key.endswith("/state1")}
    assert kinds == {torch.uint8, torch.float32}, "the small ones stay in 32"
    assert json.loads((done.folder / "checkpoint-4" / "optimizer.json").read_text())["state"][
        "0"
    ] == {"step": 4}


def test_without_moments_a_checkpoint_is_refused(folder: Path):
    done = run(folder, "bnb-lion8bit", "damaged", checkpoint_step_interval=4)
    checkpoint = done.folder / "checkpoint-4"
    state = json.loads((checkpoint / "optimizer.json").read_text())
    del state["tensors"]["0/state1"]
    (checkpoint / "optimizer.json").write_text(json.dumps(state))
    keys = {"optimizer": "bnb-lion8bit", "optimizer_config": SMALL, "max_train_steps": 5}
    refused = attempt(folder, plugins=PLUGINS, settings=keys, output="bnb-lion8bit-damaged")
    assert isinstance(refused.error, CheckpointError)


def test_on_the_cpu_nothing_is_paged_and_that_is_said_once(folder: Path):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        paged = run(folder, "bnb-adamw8bit-paged", "said")
    said = [line for line in paged.said if "nothing is paged, since the run is on the CPU" in line]
    assert len(said) == 1
    assert not [each for each in warned if "Paged" in str(each.message)]
    assert paged.weights() == run(folder, "bnb-adamw8bit", "said").weights()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("weight_decy=0.1", "did you mean 'weight_decay'?"),
        ("is_paged=True", "takes no is_paged here"),
        ("betas=(2,3)", "bnb-lion8bit refuses it: Invalid beta"),
        ("lr=1", "Set learning_rate instead"),
    ],
)
def test_arguments_are_checked_before_any_work(tmp_path: Path, config: str, text: str):
    keys = {"optimizer": "bnb-lion8bit", "optimizer_config": config}
    done = attempt(tmp_path, plugins=PLUGINS, settings=keys)
    assert isinstance(done.error, ConfigError), done.error
    assert text in str(done.error)
    assert not done.folder.exists()


def test_arguments_reach_the_optimiser(folder: Path):
    keys = {"optimizer_config": f"{SMALL},weight_decay=0.5,betas=(0.5,0.6)"}
    done = run(folder, "bnb-lion8bit", "arguments", **keys)
    group = json.loads((done.folder / "checkpoint-4" / "optimizer.json").read_text())[
        "param_groups"
    ][0]
    assert (group["weight_decay"], group["betas"]) == (0.5, [0.5, 0.6])


def test_other_devices_are_refused_by_name():
    settings = SimpleNamespace(optimizer="bnb-lion8bit")
    with pytest.raises(ConfigError, match="not on mps"):
        BitsAndBytes().check(SimpleNamespace(settings=settings, device=torch.device("mps")))


class Card:
    """A weight of so many elements on a card."""

    device = torch.device("cuda")

    def __init__(self, size: int) -> None:
        self.size = size

    def numel(self) -> int:
        return self.size


class Pager:
    """An optimiser with moments on a card, and what it was asked for."""

    def __init__(self, size: int) -> None:
        card = Card(size)
        self.value = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
        self.state = {card: {"state1": self.value, "absmax1": torch.ones(1), "step": 3}}

    def get_state_buffer(self, parameter: Any, *, dtype: torch.dtype) -> torch.Tensor:
        made = torch.zeros(2, 3, dtype=dtype)
        made.is_paged = True
        return made


@pytest.mark.parametrize(("size", "moved"), [(100_000, 1), (99_999, 0)])
def test_restored_moments_are_paged_again_where_they_were(size: int, moved: int):
    optimizer = Pager(size)
    assert page_again(optimizer) == moved
    (state,) = optimizer.state.values()
    assert torch.equal(state["state1"], optimizer.value)
    assert getattr(state["state1"], "is_paged", False) == bool(moved)
    assert page_again(optimizer) == 0


@pytest.mark.parametrize("size", [3, 80])
@pytest.mark.parametrize("name", KINDS)
def test_the_planner_gets_the_sizes_of_the_real_moments(name: str, size: int):
    weight = torch.nn.Parameter(torch.ones(size, size))
    kind = KINDS[name]
    optimizer = kind.load(paged=False)([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    real = sorted(
        (tuple(value.shape), str(value.dtype))
        for key, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )
    found = moments(weight, kind=kind, smallest=SMALLEST)
    assert sorted((shape, str(dtype)) for shape, dtype in found) == real
