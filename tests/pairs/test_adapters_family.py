"""LyCORIS on the real networks: TI2V with all techniques, both experts, weights in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trainer_core.catalogue import Catalogue
from trainer_core.exporting import Wanted, export, settings_of
from trainer_core.plugins import build
from trainer_core.testing.harness import Finished, Interrupted, attempt, train

wan = pytest.importorskip("trainer_wan")
umt5 = pytest.importorskip("trainer_umt5")
lycoris = pytest.importorskip("trainer_lycoris")

MODEL = {"wan": wan.Wan, "umt5": umt5.Umt5, "lycoris": lycoris.Lycoris}
PRESET = {"target_module": ["Attention", "FeedForward"]}
LOKR = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4, "apply_preset": PRESET}
LOHA = {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "apply_preset": PRESET}
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 1}
CORE = {"model_type": "lora", "lora_type": "lycoris", "learning_rate": 1e-2, "max_train_steps": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters-family")


def checkpoint(world: Path, flavour: str) -> dict[str, Any]:
    from trainer_wan.testing import write_checkpoint

    folder = world / f"model-{flavour}"
    if not folder.exists():
        write_checkpoint(folder, flavour=flavour, layers=2)
    return {"model_flavour": flavour, "pretrained_model_name_or_path": str(folder)}


def interrupted(world: Path, **arguments: Any) -> Finished:
    """Crash in step 3 and go on."""
    assert isinstance(attempt(world, **arguments, crash_at=3).error, Interrupted)
    return train(world, **arguments)


def exported(done: Finished, plugins: Mapping[str, type]) -> list[Any]:
    catalogue = Catalogue.of(plugins)
    resolved = settings_of(done.folder, args=(), catalogue=catalogue)
    host = build(resolved, catalogue=catalogue)
    return export(resolved, host, Wanted(done.folder, "comfyui"), say=lambda _: None)


@pytest.mark.parametrize("content", [LOKR, LOHA], ids=["lokr", "loha"])
def test_on_token_wise_timesteps_with_routes_taps_and_rollouts(world: Path, content: Any):
    tread = pytest.importorskip("trainer_tread")
    crepa = pytest.importorskip("trainer_crepa")
    rollout = pytest.importorskip("trainer_scheduled_sampling")
    pytest.importorskip("trainer_crepa.testing").write_teacher(world / "teacher")
    plugins = {**MODEL, "tread": tread.Tread, "crepa": crepa.Crepa,
               "scheduled_sampling": rollout.ScheduledSampling}  # fmt: skip
    settings = {
        **CORE,
        **checkpoint(world, "ti2v-5b-2.2"),
        "lycoris_config": content,
        "wan_first_frame_probability": 0.5,
        "gradient_checkpointing": True,
        "use_ema": True,
        "resolution": 64,
        "tread_config": {"routes": [ROUTE]},
        "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"),
        "crepa_encoder_image_size": 64,
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.7,
    }
    kind = content["algo"]
    done = train(world, plugins=plugins, settings=settings, output=f"{kind}-ti2v")
    assert {"crepa", "scheduled_sampling/rolled"} <= set(done.steps[0])
    again = interrupted(world, plugins=plugins, settings=settings, output=f"{kind}-ti2v-again")
    assert again.steps == done.steps
    assert again.weights() == done.weights()
    (one,) = exported(done, plugins)
    assert (one.num_layers, one.error <= 1e-5) == (2 * (2 * 4 + 2), True)


def test_both_experts_train_apart_and_leave_two_files(world: Path):
    settings = {
        **CORE, **checkpoint(world, "t2v-14b-2.2-both"), "lycoris_config": LOKR,
        "flow_schedule_shift": 8.0, "max_train_steps": 6, "train_batch_size": 1,
    }  # fmt: skip
    done = train(world, plugins=MODEL, settings=settings, output="both")
    assert len([name for name in done.weights() if name.startswith("pytorch_lora")]) == 2
    high, low = exported(done, MODEL)
    assert high.path.name == "both-comfyui-transformer.safetensors"
    assert low.path.name == "both-comfyui-transformer_2.safetensors"
    assert high.path.read_bytes() != low.path.read_bytes()
    again = interrupted(world, plugins=MODEL, settings=settings, output="both-again")
    assert again.weights() == done.weights()


IN_8_BITS: dict[str, dict[str, Any]] = {
    "lokr": {"lora_type": "lycoris", "lycoris_config": LOKR},
    "lokr-dora": {"lora_type": "lycoris", "lycoris_config": {**LOKR, "dora_wd": True}},
    "loha": {"lora_type": "lycoris", "lycoris_config": LOHA},
    "dora": {"lora_type": "standard", "lora_rank": 2, "use_dora": True},
}


@pytest.mark.parametrize("kind", IN_8_BITS)
@pytest.mark.parametrize("store", ["quanto", "torchao"])
def test_beside_weights_in_8_bits(world: Path, kind: str, store: str):
    if find_spec({"quanto": "optimum", "torchao": "torchao"}[store]) is None:
        pytest.skip("the library is not installed")
    name = {"quanto": "Quanto", "torchao": "TorchAO"}[store]
    plugins = {**MODEL, store: getattr(pytest.importorskip(f"trainer_{store}"), name)}
    if kind == "dora":
        plugins.pop("lycoris")
        plugins["lora"] = pytest.importorskip("trainer_lora").Lora
    settings = {
        **CORE, **checkpoint(world, "t2v-480p-1.3b-2.1"), **IN_8_BITS[kind],
        "base_model_precision": f"int8-{store}",
    }  # fmt: skip
    output = f"{kind}-int8-{store}"
    done = train(world, plugins=plugins, settings=settings, output=output)
    assert len({event["loss"] for event in done.steps}) == 4
    again = interrupted(world, plugins=plugins, settings=settings, output=f"{output}-again")
    assert again.weights() == done.weights()
    (one,) = exported(done, plugins)
    assert one.error <= 1e-5


def as_kohya(path: Path) -> Path:
    """Rename a run's own file as kohya's scripts write it: whole blocks, alpha beside."""
    import torch
    from safetensors.torch import load_file, save_file

    names = {"attn1.to_": "self_attn_", "attn2.to_": "cross_attn_", "out.0": "o"}
    tensors = {}
    for name, value in load_file(path).items():
        layer, _, part = name.removeprefix("transformer.").partition(".lora_")
        for ours, theirs in names.items():
            layer = layer.replace(ours, theirs)
        start = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{start}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        tensors[f"{start}.alpha"] = torch.tensor(2.0)
    for block in range(2):  # diffusers reads such files with feed-forward layers only
        for number, (out, into) in ((0, (96, 48)), (2, (48, 96))):
            start = f"lora_unet_blocks_{block}_ffn_{number}"
            tensors |= {
                f"{start}.lora_down.weight": torch.zeros(3, into),
                f"{start}.lora_up.weight": torch.zeros(out, 3),
                f"{start}.alpha": torch.tensor(2.0),
            }
    save_file(tensors, path.with_name("kohya.safetensors"))
    return path.with_name("kohya.safetensors")


@pytest.mark.parametrize("source", ["own", "comfyui", "kohya"])
def test_a_t2v_lora_starts_an_i2v_run(world: Path, source: str):
    """From the run's own file, or from the exported one, which many LoRA on the web look like."""
    lora = pytest.importorskip("trainer_lora")
    clip = pytest.importorskip("trainer_clip")
    plugins = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "clip": clip.Clip}
    core = {**CORE, "lora_type": "standard", "lora_rank": 3, "lora_alpha": 2, "max_train_steps": 2}
    named = ["wan", "lora"]
    done = train(
        world, plugins=plugins, named=named, output=f"t2v-{source}",
        settings={**core, **checkpoint(world, "t2v-480p-1.3b-2.1")},
    )  # fmt: skip
    path = done.folder / "pytorch_lora_weights.safetensors"
    if source == "comfyui":
        (one,) = exported(done, plugins)
        path = one.path
    if source == "kohya":
        path = as_kohya(path)
    settings = {**core, **checkpoint(world, "i2v-14b-2.1"), "init_lora": str(path)}
    number = 16
    if source == "kohya":
        targets = "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2"
        settings["peft_lora_target_modules"], number = targets, 20
    i2v = train(world, plugins=plugins, named=named, settings=settings, output=f"i2v-{source}")
    assert f"transformer starts from {number} layers of {path}." in i2v.said
    fresh = {k: v for k, v in settings.items() if k != "init_lora"}
    plain = train(world, plugins=plugins, named=named, settings=fresh, output=f"plain-{source}")
    assert plain.draws == i2v.draws
    assert plain.steps[0]["loss"] != i2v.steps[0]["loss"]
