"""It learns without a learning rate that fits; what it refuses, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer_core import ConfigError, LossTerm, ParameterGroup, PluginInfo, hookimpl
from trainer_core.testing.harness import attempt, train
from trainer_prodigy import Prodigy
from trainer_prodigy.hooks import NUM_STATES

pytest.importorskip("prodigyopt")
KEYS = {"optimizer": "prodigy", "learning_rate": 1.0}


def test_it_finds_a_step_size_and_learns(tmp_path: Path):
    keys = {**KEYS, "max_train_steps": 60, "checkpoint_step_interval": 30}
    keys["optimizer_config"] = "d0=1e-4"
    done = train(tmp_path, plugins={"prodigy": Prodigy}, settings=keys, num_held_out=2)
    first, last = (event["eval/eval"] for event in done.events if event["kind"] == "eval")
    assert last < 0.9 * first
    found = [
        json.loads((done.folder / f"checkpoint-{step}" / "optimizer.json").read_text())[
            "param_groups"
        ][0]["d"]
        for step in (30, 60)
    ]
    assert found[0] > 1e-4, "above where it starts"
    assert found[1] >= found[0]


def test_a_learning_rate_of_another_optimiser_is_told(tmp_path: Path):
    keys = {"optimizer": "prodigy", "learning_rate": 1e-4, "max_train_steps": 1}
    done = train(tmp_path, plugins={"prodigy": Prodigy}, settings=keys)
    assert any(
        "learning_rate 0.0001 multiplies that; the usual value is 1" in line for line in done.said
    )


def test_its_arguments_are_checked(tmp_path: Path):
    keys = {**KEYS, "optimizer_config": "d_coeff=2"}
    done = attempt(tmp_path, plugins={"prodigy": Prodigy}, settings=keys)
    assert isinstance(done.error, ConfigError), done.error
    assert "did you mean 'd_coef'?" in str(done.error)


class Own:
    """Trains a weight of its own at its own rate."""

    info = PluginInfo(summary="Own")

    def __init__(self, settings: Any) -> None:
        self.weight = nn.Parameter(torch.ones(1))

    def parameters(self) -> list[ParameterGroup]:
        return [ParameterGroup("own", [("weight", self.weight)], learning_rate=0.5)]

    @hookimpl
    def compute_loss(self, output: Any) -> LossTerm:
        return LossTerm("own", self.weight.square().expand(output.prediction.shape[0]))


def test_another_learning_rate_beside_it_is_refused_with_its_name(tmp_path: Path):
    done = attempt(tmp_path, plugins={"prodigy": Prodigy, "own": Own}, settings=KEYS)
    assert isinstance(done.error, ConfigError), done.error
    assert "own" in str(done.error)
    assert "brings a learning rate" in str(done.error)


def test_the_planner_gets_the_sizes_of_the_real_state():
    from prodigyopt import Prodigy as Implementation

    weight = nn.Parameter(torch.ones(5, 3))
    optimizer = Implementation([weight])
    weight.square().sum().backward()
    optimizer.step()
    state = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    assert [value.numel() for value in state] == [weight.numel()] * NUM_STATES
