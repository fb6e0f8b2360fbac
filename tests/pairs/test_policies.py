"""Checkpoint policies and chunks on a real Wan, with TREAD, moved weights and quantised ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.harness import Finished, train

wan = pytest.importorskip("trainer_wan")
testing = pytest.importorskip("trainer_wan.testing")
umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
tread = pytest.importorskip("trainer_tread")
POLICIES = ("full", "ffn", "keep_attention")
PLUGINS = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "tread": tread.Tread}
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    testing.write_checkpoint(folder / "model", layers=3)
    return folder


def run(world: Path, output: str, plugins: dict[str, type] | None = None, **keys: Any) -> Finished:
    settings = {
        "pretrained_model_name_or_path": str(world / "model"),
        "model_type": "lora",
        "lora_rank": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "tread_config": {"routes": [ROUTE]},
        "gradient_checkpointing": True,
        **keys,
    }
    return train(world, plugins={**PLUGINS, **(plugins or {})}, settings=settings, output=output)


@pytest.fixture(scope="module")
def plain(world: Path) -> Finished:
    return run(world, "plain", gradient_checkpointing=False)


def moving() -> dict[str, type]:
    """Return the offload plugin on its tests' own device, which spoils what has gone."""
    pytest.importorskip("trainer_group_offload")
    path = Path(__file__).parents[2] / "plugins" / "group_offload" / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("offload_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"group_offload": module.OnCpu}


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_a_bit_of_a_routed_run(world, plain, policy, interval):
    keys = {
        "gradient_checkpointing_policy": policy,
        "gradient_checkpointing_interval": interval,
    }
    assert run(world, f"{policy}-{interval}", **keys).weights() == plain.weights()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_a_bit_where_weights_move(world, plain, policy):
    keys = {"gradient_checkpointing_policy": policy, "group_offload_use_stream": True}
    done = run(world, f"moved-{policy}", moving(), enable_group_offload=True, **keys)
    assert done.weights() == plain.weights()
    device = done.plugin("group_offload").device
    assert device.log
    assert device.most <= 2


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_change_no_more_than_rounding(world, plain, monkeypatch, policy, offload):
    monkeypatch.setattr("trainer_wan.config.LEAST_CHUNK", 3)
    keys = {
        "gradient_checkpointing_policy": policy,
        "enable_chunked_feed_forward": True,
        "feed_forward_chunk_size": 3,
        "enable_group_offload": offload,
    }
    plugins = moving() if offload else {}
    keys = keys if offload else {k: v for k, v in keys.items() if k != "enable_group_offload"}
    done = run(world, f"chunks-{policy}-{offload}", plugins, **keys)
    first, other = (e["loss"] for e in (plain.steps[-1], done.steps[-1]))
    assert other == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_go_with_quantised_weights(world, policy):
    quanto = pytest.importorskip("trainer_quanto")
    plugins = {"quanto": quanto.Quanto}
    keys = {"base_model_precision": "int8-quanto"}
    first = run(world, "quantised", plugins, gradient_checkpointing=False, **keys)
    keys["gradient_checkpointing_policy"] = policy
    assert run(world, f"quantised-{policy}", plugins, **keys).weights() == first.weights()
