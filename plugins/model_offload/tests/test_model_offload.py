"""When the model is put aside, and that it comes back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer_core import MODEL_ASIDE, ConfigError, PluginInfo, hookimpl
from trainer_core.testing.harness import attempt, train
from trainer_core.testing.tiny import Tiny
from trainer_model_offload import ModelOffload

RENDERS = {
    "validation_prompt": "a red circle",
    "validation_step_interval": 2,
    "validation_num_inference_steps": 2,
    "validation_num_video_frames": 5,
    "validation_resolution": "32x32",
    "max_train_steps": 2,
}
LOG: list[str] = []


class Recorder(ModelOffload):
    """Acts on the CPU and writes down what it moves: aside before a decode, back behind it."""

    def attach(self, run: Any) -> None:
        LOG.clear()
        run.state[MODEL_ASIDE] = lambda: self.aside(run)

    def move(self, parts: Any, devices: Any) -> None:
        super().move(parts, devices)
        LOG.append("back" if LOG and LOG[-1] == "decode" else "aside")


class Decoding(Tiny):
    """A model that decodes its samples with the model put aside."""

    @hookimpl
    def validate(self, run: Any) -> Any:
        with run.state[MODEL_ASIDE]():
            LOG.append("decode")
            assert LOG[-2:] == ["aside", "decode"]
            return super().validate(run)


def test_the_model_is_aside_while_samples_are_decoded_and_back_afterwards(tmp_path: Path):
    plugins = {"model_offload": ModelOffload, "tiny": Tiny}
    plain = train(tmp_path, plugins=plugins, named=["tiny"], settings=RENDERS, output="plain")
    plugins = {"model_offload": Recorder, "tiny": Decoding}
    done = train(tmp_path, plugins=plugins, settings=RENDERS, output="moved")
    assert LOG == ["aside", "decode", "back"] * 2
    assert done.weights() == plain.weights()
    assert done.events == plain.events


def test_all_comes_back_to_where_it_was_after_an_error_too():
    """One of two layers rests in host memory, and stays there."""
    plugin, moved = ModelOffload(settings=None), []  # type: ignore[arg-type]
    plugin.move = lambda parts, devices: moved.append([d.type for d in devices])  # type: ignore[method-assign]
    awake, rests = nn.Linear(1, 1, device="meta"), nn.Linear(1, 1)
    model = SimpleNamespace(networks={"a": awake, "b": rests}, modules={"a": awake})
    run: Any = SimpleNamespace(device=torch.device("cuda", 0), model=model)
    with pytest.raises(ValueError, match="no room"), plugin.aside(run):
        raise ValueError("no room")
    assert moved == [["cpu"] * 4, ["meta", "meta", "cpu", "cpu"]]


def test_on_the_cpu_it_says_that_it_has_no_effect(tmp_path: Path):
    keys = {"enable_model_cpu_offload": True, "max_train_steps": 1}
    done = train(tmp_path, plugins={"model_offload": ModelOffload}, settings=keys)
    assert sum("enable_model_cpu_offload has no effect here" in line for line in done.said) == 1


class Group:
    info = PluginInfo(summary="Stands in for group_offload")

    def __init__(self, settings: Any) -> None:
        pass


def test_it_excludes_group_offload(tmp_path: Path):
    plugins = {"model_offload": ModelOffload, "group_offload": Group}
    done = attempt(tmp_path, plugins=plugins, settings={"enable_model_cpu_offload": True})
    assert isinstance(done.error, ConfigError), done.error
    assert "group_offload" in str(done.error)
    assert "cannot share a run" in str(done.error)
