"""On a real, tiny Wan: every checkpoint policy, in the model's own block runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.harness import Finished, train

lora = pytest.importorskip("trainer_lora")
wan = pytest.importorskip("trainer_wan")
umt5 = pytest.importorskip("trainer_umt5")
testing = pytest.importorskip("trainer_wan.testing")
POLICIES = {
    "none": {"gradient_checkpointing": False},
    "full": {"gradient_checkpointing": True},
    "ffn": {"gradient_checkpointing": True, "gradient_checkpointing_policy": "ffn"},
    "keep_attention": {
        "gradient_checkpointing": True, "gradient_checkpointing_policy": "keep_attention",
    },
    "every second": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload-wan")
    testing.write_checkpoint(folder / "wan", layers=3)
    return folder


def run(folder: Path, plugin: type | None, output: str, **keys: Any) -> Finished:
    plugins: dict[str, type] = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora}
    if plugin is not None:
        plugins["group_offload"] = plugin
        keys["enable_group_offload"] = True
    settings = {
        "model_type": "lora", "lora_rank": 2, "max_train_steps": 2,
        "pretrained_model_name_or_path": str(folder / "wan"),
        "pretrained_t5_model_name_or_path": str(folder / "wan"), **keys,
    }  # fmt: skip
    return train(folder, plugins=plugins, settings=settings, output=output.replace(" ", "-"))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_no_bit_and_no_promise(folder: Path, on_cpu, policy: str):
    keys = POLICIES[policy]
    plain = run(folder, None, f"plain-{policy}", **keys)
    moved = run(folder, on_cpu, f"moved-{policy}", group_offload_use_stream=True, **keys)
    assert moved.steps == plain.steps
    assert moved.weights() == plain.weights()
    assert moved.plugin("group_offload").device.most == 2


@pytest.mark.parametrize(("keys", "most"), [({}, 3), ({"use_dora": True}, 1)], ids=["lora", "dora"])
def test_layer_by_layer_too(folder: Path, on_cpu, keys: dict[str, Any], most: int):
    """Query, key and value of a LoRA are computed together; DoRA reads its layer's weight by itself."""
    keys = keys | POLICIES["full"]
    name = "-".join(("leaf", *keys))
    plain = run(folder, None, f"plain-{name}", **keys)
    moved = run(folder, on_cpu, f"moved-{name}", group_offload_type="leaf_level", **keys)
    assert moved.weights() == plain.weights()
    assert moved.plugin("group_offload").device.most == most


@pytest.mark.parametrize("way", [{}, {"group_offload_to_disk_path": "disk"}], ids=["host", "disk"])
@pytest.mark.parametrize("kind", ["dora", "lycoris"])
def test_adapters_that_read_the_weights_when_they_are_saved(
    folder: Path, on_cpu, kind: str, way: dict[str, str]
):
    """Their files are proven against the weights, which are away by then."""
    plugins: dict[str, type] = {"wan": wan.Wan, "umt5": umt5.Umt5}
    keys: dict[str, Any] = {"lora_rank": 2, "use_dora": True}
    if kind == "lycoris":
        plugins["lycoris"] = pytest.importorskip("trainer_lycoris").Lycoris
        pytest.importorskip("lycoris")
        config = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4}
        (folder / "lokr.json").write_text(json.dumps(config))
        keys = {"lora_type": "lycoris", "lycoris_config": str(folder / "lokr.json")}
    else:
        plugins["lora"] = lora.Lora
    model = str(folder / "wan")
    keys |= {"model_type": "lora", "max_train_steps": 2, "pretrained_model_name_or_path": model}
    keys |= {"pretrained_t5_model_name_or_path": model}
    plain = train(folder, plugins=plugins, settings=keys, output=f"saved-{kind}-{len(way)}")
    keys |= {name: str(folder / f"{kind}-{value}") for name, value in way.items()}
    keys |= {"enable_group_offload": True}
    plugins["group_offload"] = on_cpu
    moved = train(folder, plugins=plugins, settings=keys, output=f"saved-{kind}-{len(way)}-moved")
    assert moved.weights() == plain.weights()
