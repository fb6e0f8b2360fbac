"""Through the real loop, on a device that writes down what comes and goes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_core import ConfigError
from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_group_offload import GroupOffload
from trainer_group_offload.config import GroupOffloadSettings
from trainer_group_offload.tensors import leaves, mapped, rebuilt

lora = pytest.importorskip("trainer_lora")
KEYS = {"model_type": "lora", "peft_lora_target_modules": "q,k,v,out", "lora_rank": 2}
RENDERS = {
    "validation_prompt": "a red circle",
    "validation_step_interval": 2,
    "eval_steps_interval": 2,
    "num_eval_images": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


def run(folder: Path, plugin: type, output: str, **keys: Any) -> Finished:
    crash = keys.pop("crash_at", None)
    plugins = {"group_offload": plugin, "lora": lora.Lora}
    named = ["lora", "group_offload"] if keys.get("enable_group_offload", True) else ["lora"]
    return train(
        folder, plugins=plugins, named=named, settings={**KEYS, **keys}, output=output,
        crash_at=crash, num_held_out=2,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"group_offload_use_stream": True},
        {"group_offload_use_stream": True, "group_offload_blocks_per_group": 3},
        {"group_offload_type": "leaf_level"},
        {"group_offload_to_disk_path": "disk"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "plain",
)
def test_it_changes_no_bit_of_a_run(folder: Path, on_cpu, keys, checkpointing: bool):
    """With evaluation between the steps, and after a crash."""
    keys = {**keys, "gradient_checkpointing": checkpointing, "eval_steps_interval": 2}
    if "group_offload_to_disk_path" in keys:
        keys["group_offload_to_disk_path"] = str(folder / "disk")
    name = "-".join(map(str, keys.values())).replace("/", "_")
    plain = run(folder, on_cpu, f"plain-{checkpointing}", enable_group_offload=False, **keys)
    moved = run(folder, on_cpu, f"moved-{name}", **keys)
    assert moved.events == plain.events
    assert moved.weights() == plain.weights()
    device = moved.plugin("group_offload").device
    assert device.log, "it did move"
    assert device.most <= (2 if keys.get("group_offload_use_stream") else 1)
    with pytest.raises(Interrupted):
        run(folder, on_cpu, f"killed-{name}", crash_at=3, **keys)
    assert run(folder, on_cpu, f"killed-{name}", **keys).weights() == plain.weights()


def test_weights_lie_in_files_where_the_key_says_so(folder: Path, on_cpu):
    disk = folder / "weights"
    done = run(
        folder,
        on_cpu,
        "files",
        group_offload_to_disk_path=str(disk),
        group_offload_blocks_per_group=2,
    )
    assert sorted(path.name for path in disk.iterdir()) == [
        "transformer-00000.safetensors", "transformer-00001.safetensors",
    ]  # fmt: skip
    assert any(f"GiB of transformer lie in {disk}" in line for line in done.said)


def test_without_cuda_one_warning_and_the_run_goes_on(folder: Path):
    done = run(folder, GroupOffload, "cpu", enable_group_offload=True)
    assert sum("enable_group_offload needs CUDA" in line for line in done.said) == 1
    plain = run(folder, GroupOffload, "cpu-plain", enable_group_offload=False)
    assert done.weights() == plain.weights()


def test_keys_that_cannot_act_together_are_told(folder: Path, on_cpu):
    done = run(
        folder, on_cpu, "idle", group_offload_type="leaf_level", group_offload_use_stream=True
    )
    assert any("group_offload_use_stream has no effect" in line for line in done.said)


def refused(folder: Path, plugin: type, **keys: Any) -> str:
    plugins = {"group_offload": plugin, "lora": lora.Lora}
    settings = {"enable_group_offload": True, **KEYS, **keys}
    done = attempt(folder, plugins=plugins, settings=settings, output="refused")
    assert isinstance(done.error, ConfigError), done.error
    return str(done.error)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, on_cpu):
    (tmp_path / "file").write_text("")
    text = refused(tmp_path, on_cpu, group_offload_to_disk_path=str(tmp_path / "file"))
    assert "group_offload_to_disk_path" in text
    assert "is a file" in text


def test_trained_weights_are_not_moved(tmp_path: Path, on_cpu):
    plugins = {"group_offload": on_cpu}
    done = attempt(tmp_path, plugins=plugins, settings={"enable_group_offload": True})
    assert isinstance(done.error, ConfigError), done.error
    assert "trains all of them" in str(done.error)


@pytest.mark.parametrize("name", ["quanto", "torchao"])
@pytest.mark.parametrize("stream", [False, True])
def test_quantised_weights_move_as_what_they_are_made_of(
    folder: Path, on_cpu, name: str, stream: bool
):
    library = {"quanto": "optimum", "torchao": "torchao"}[name]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    quantiser = pytest.importorskip(f"trainer_{name}")
    plugin = getattr(quantiser, {"quanto": "Quanto"}.get(name, "TorchAO"))
    keys = {**KEYS, "base_model_precision": f"int8-{name}", "gradient_checkpointing": True}
    results = []
    for moving in (False, True):
        plugins = {"lora": lora.Lora, name: plugin, **({"group_offload": on_cpu} if moving else {})}
        more = {"enable_group_offload": True, "group_offload_use_stream": stream} if moving else {}
        results.append(
            train(
                folder,
                plugins=plugins,
                settings={**keys, **more},
                output=f"{name}-{moving}-{stream}",
            )
        )
    assert results[1].weights() == results[0].weights()
    assert results[1].plugin("group_offload").device.most <= (2 if stream else 1)


def test_a_plain_tensor_is_its_own_leaf():
    tensor = torch.randn(3, 2)
    assert leaves(tensor)[0] is tensor
    other = torch.zeros(3, 2)
    assert rebuilt(tensor, [other]) is other
    assert torch.equal(mapped(tensor, lambda leaf: leaf + 1), tensor + 1)


def test_a_plan_moves_nothing(on_cpu):
    plugin = on_cpu(GroupOffloadSettings(enable_group_offload=True))
    assert plugin.offload(run=SimpleNamespace(sketch=object()), phase=None) is None


@pytest.mark.parametrize(
    ("keys", "bytes_at_once"),
    [
        ({}, 9),
        ({"group_offload_use_stream": True}, 16),
        ({"group_offload_blocks_per_group": 2}, 12),
    ],
)
def test_what_is_there_at_once_is_told_to_a_plan(keys: dict[str, Any], bytes_at_once: int):
    plugin = GroupOffload(GroupOffloadSettings(enable_group_offload=True, **keys))
    assert plugin.resident_bytes([5, 7, 9, 2]) == bytes_at_once
