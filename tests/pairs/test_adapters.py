"""Adapters with TREAD, CREPA and scheduled sampling at once: each acts, and a resume keeps every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.testing.harness import Interrupted, train

tread = pytest.importorskip("trainer_tread")
crepa = pytest.importorskip("trainer_crepa")
rollout = pytest.importorskip("trainer_scheduled_sampling")
testing = pytest.importorskip("trainer_crepa.testing")

ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}
PRESET = {"target_name": [r"blocks\..*"]}
LOKR = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4, "apply_preset": PRESET}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"peft_lora_target_modules": "q,k,v,out", "lora_rank": 2}),
    "dora": ("Lora", {"peft_lora_target_modules": "q,k,v,out", "lora_rank": 2, "use_dora": True}),
    "lokr": ("Lycoris", {"lora_type": "lycoris", "lycoris_config": LOKR}),
    "loha": (
        "Lycoris",
        {"lora_type": "lycoris", "lycoris_config": {"algo": "loha", "apply_preset": PRESET}},
    ),
}


def plugins(kind: str) -> dict[str, type]:
    adapter = pytest.importorskip(f"trainer_{ADAPTERS[kind][0].lower()}")
    return {
        ADAPTERS[kind][0].lower(): getattr(adapter, ADAPTERS[kind][0]),
        "tread": tread.Tread,
        "crepa": crepa.Crepa,
        "scheduled_sampling": rollout.ScheduledSampling,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    testing.write_teacher(folder / "teacher")
    return folder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_trains_with_all_three_and_resumes_bit_for_bit(world: Path, kind: str):
    settings: dict[str, Any] = {
        "model_type": "lora",
        "max_train_steps": 4,
        "gradient_checkpointing": True,
        "use_ema": True,
        "tread_config": {"routes": [ROUTE]},
        "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"),
        "crepa_encoder_image_size": 64,
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
        **ADAPTERS[kind][1],
    }
    given = {"plugins": plugins(kind), "settings": settings}
    through = train(world, **given, output=f"{kind}-through")
    with pytest.raises(Interrupted):
        train(world, **given, output=f"{kind}-parts", crash_at=3)
    resumed = train(world, **given, output=f"{kind}-parts")
    assert resumed.events == through.events
    assert resumed.weights() == through.weights()
    assert len(through.weights()) >= 2
    step = through.steps[0]
    assert {"crepa", "scheduled_sampling/rolled"} <= set(step)
    for technique in ("tread", "crepa", "scheduled_sampling"):
        named = [name for name in given["plugins"] if name != technique]
        without = train(world, **given, named=named, output=f"{kind}-no-{technique}")
        assert without.draws == through.draws
        first, second = without.weights(), through.weights()
        assert [e["loss"] for e in without.steps] != [e["loss"] for e in through.steps], technique
        assert first.keys() == second.keys()
