"""Frozen weights in 8 bits below everything else: adapters, routes, alignment, checkpointing, resume."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core.quantising import inner_tensors
from trainer_core.settings.files import read_json
from trainer_core.testing.harness import Finished, Interrupted, train

lora = pytest.importorskip("trainer_lora")
LIBRARIES = {"quanto": "optimum", "torchao": "torchao"}
QUANTISERS = [n for n, lib in LIBRARIES.items() if find_spec(f"trainer_{n}") and find_spec(lib)]
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}
LORA = {"model_type": "lora", "lora_rank": 2}


def quantiser(name: str) -> type:
    found: type = getattr(
        pytest.importorskip(f"trainer_{name}"), {"quanto": "Quanto"}.get(name, "TorchAO")
    )
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def techniques(world: Path) -> tuple[dict[str, type], dict[str, Any]]:
    tread, crepa = (pytest.importorskip(f"trainer_{name}") for name in ("tread", "crepa"))
    pytest.importorskip("trainer_crepa.testing").write_teacher(world / "teacher")
    keys = {
        "tread_config": {"routes": [ROUTE]},
        "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"),
        "crepa_encoder_image_size": 64,
        "peft_lora_target_modules": "q,k,v,out",
        **LORA,
    }
    return {"tread": tread.Tread, "crepa": crepa.Crepa, "lora": lora.Lora}, keys


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", QUANTISERS)
def test_techniques_act_on_quantised_blocks(world: Path, techniques, name: str, kind: str):
    """With TREAD and CREPA: draws of the plain run, the same bits with checkpointing, after a crash."""
    plugins, keys = techniques
    plugins = {**plugins, name: quantiser(name)}
    precision = f"{kind}-{name}"

    def run(output: str, **more: Any) -> Finished:
        crash = more.pop("crash_at", None)
        settings = {**keys, "base_model_precision": precision, **more}
        named = [n for n in plugins if n != name or settings["base_model_precision"] == precision]
        return train(
            world, plugins=plugins, named=named, settings=settings, crash_at=crash,
            output=f"{precision}-{output}",
        )  # fmt: skip

    plain, stored = run("plain", base_model_precision="no_change"), run("stored")
    assert stored.draws == plain.draws
    assert stored.weights() != plain.weights()
    assert all("crepa" in event for event in stored.steps)
    for one, other in zip(stored.steps, plain.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    assert run("checkpointed", gradient_checkpointing=True).weights() == stored.weights()
    with pytest.raises(Interrupted):
        run("killed", crash_at=3)
    assert run("killed").weights() == stored.weights()


class Watch:
    """Keeps the run's model."""

    def __init__(self, settings: Any) -> None:
        self.model: Any = None

    def attach(self, run: Any) -> None:
        self.model = run.model


@pytest.fixture(scope="module")
def checkpoint(world: Path) -> dict[str, Any]:
    pytest.importorskip("trainer_umt5")
    pytest.importorskip("trainer_wan").Wan  # noqa: B018  # it must be there
    testing = pytest.importorskip("trainer_wan.testing")
    folder = str(testing.write_checkpoint(world / "wan", layers=2))
    return {"pretrained_model_name_or_path": folder, "pretrained_t5_model_name_or_path": folder}


def on_wan(
    world: Path, checkpoint: dict[str, Any], name: str, output: str, **keys: Any
) -> Finished:
    from trainer_core import PluginInfo

    watch = type("Watching", (Watch,), {"info": PluginInfo(summary="Watches")})
    wan, umt5 = (pytest.importorskip(f"trainer_{n}") for n in ("wan", "umt5"))
    plugins = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "watch": watch}
    plugins[name] = quantiser(name)
    settings = {**LORA, **checkpoint, "max_train_steps": 2, **keys}
    return train(world, plugins=plugins, settings=settings, output=f"{name}-{output}")


@pytest.mark.parametrize("name", QUANTISERS)
def test_wan_in_bfloat16_around_and_below(world: Path, checkpoint, name: str):
    """Products in bfloat16, blocks in int8, the rest in float32 where the key says so."""
    found = {}
    for rest in (None, "fp32"):
        done = on_wan(
            world, checkpoint, name, f"rest-{rest}", base_model_precision=f"int8-{name}",
            base_model_default_dtype=rest, mixed_precision="bf16",
        )  # fmt: skip
        transformer = done.plugin("watch").model.modules["transformer"]
        found[rest] = transformer.condition_embedder.text_embedder.linear_1.weight.dtype
        for block in transformer.blocks:
            weight = block.ffn.net[0].proj.weight
            assert inner_tensors(weight), "the feed-forward is stored in 8 bits"
            assert weight.dtype == torch.bfloat16, "and computes in bfloat16"
    assert found == {None: torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_stored_text_encoder_has_a_cache_of_its_own(world: Path, checkpoint, name: str):
    keys = {"mixed_precision": "no", "base_model_precision": f"int8-{name}"}
    plain = on_wan(world, checkpoint, name, "text-plain", **keys)
    stored = on_wan(
        world, checkpoint, name, "text-stored", **keys, text_encoder_1_precision=f"int8-{name}"
    )
    again = on_wan(
        world, checkpoint, name, "text-again", **keys, text_encoder_1_precision=f"int8-{name}"
    )
    assert any("cache of umt5.text: 0 reused" in line for line in stored.said)
    assert any(f"text encoder in int8-{name}: 14 layers, " in line for line in stored.said)
    assert any("0 encoded" in line for line in again.said if "cache of umt5.text" in line)
    assert again.steps == stored.steps
    assert stored.steps != plain.steps
    for one, other in zip(stored.steps, plain.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


RECIPE = Path(__file__).parents[2] / "config" / "minimal-vram" / "config.json.example"
ITS_OWN = ("model_family", "data_backend_config", "cache_dir", "output_dir", "resolution_type")


def test_the_recipe_for_the_least_memory_trains(world: Path, checkpoint):
    """The preset as it is, on a tiny checkpoint and clips: every part of it acts."""
    bnb = pytest.importorskip("trainer_bitsandbytes")
    pytest.importorskip("bitsandbytes")
    if "quanto" not in QUANTISERS:
        pytest.skip("quanto is not here")
    wan, umt5 = (pytest.importorskip(f"trainer_{n}") for n in ("wan", "umt5"))
    plugins = {"wan": wan.Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "quanto": quantiser("quanto")}
    plugins["bitsandbytes"] = bnb.BitsAndBytes
    keys = {key: value for key, value in read_json(RECIPE).items() if key not in ITS_OWN}
    keys |= {**checkpoint, "resolution": 32, "max_train_steps": 12, "lr_warmup_steps": 0}
    keys["learning_rate"] = 1e-2
    done = train(world, plugins=plugins, settings=keys, output="recipe", num_held_out=2)
    first, last = (event["eval/eval"] for event in done.events if event["kind"] == "eval")
    assert last < first
    for mark in ("blocks in int8-quanto", "text encoder in int8-quanto", "nothing is paged"):
        assert any(mark in line for line in done.said), mark
