"""Ranks, alphas and dropouts of single layers, and DoRA, on a tiny real Wan transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open

from trainer_core.errors import CheckpointError, ConfigError
from trainer_lora.shape import Shape

FILE = "pytorch_lora_weights.safetensors"
PATTERNS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_rank_pattern": {"attn2.to_k": 2, "blocks.1.attn2.to_k": 3, "to_v": 1},
    "lora_alpha_pattern": {"attn1.to_q": 9},
    "lora_dropout": 0.5,
    "lora_dropout_pattern": {"attn1": 0.1, "attn1.to_q": 0, "to_out.0": 0.2},
}


def test_the_longest_name_counts_and_alpha_follows_the_layers_rank():
    shape = Shape(4, None, 0.5, ("to_k",), {"to_k": 2, "1.attn.to_k": 3}, {"attn.to_k": 8})
    assert (shape.of("blocks.0.attn.to_k").rank, shape.of("blocks.1.attn.to_k").rank) == (2, 3)
    assert (shape.of("blocks.0.attn.to_k").alpha, shape.of("blocks.0.other.to_k").alpha) == (8, 2)
    assert shape.of("blocks.0.attn.sto_k").rank == 4
    fixed = Shape(4, 6, 0.5, ("to_k",), {"to_k": 2})
    assert fixed.of("blocks.0.to_k").alpha == 6


def test_patterns_reach_the_layers_they_name(tiny: Any, tmp_path: Path):
    keys = {**PATTERNS, "lora_dropout_pattern": {"attn1.to_q": 0, "to_out.0": 0.2}}
    _, run = tiny.set_up(tmp_path, **keys)
    module = run.model.modules["transformer"]

    def facts(name: str) -> tuple[int, float, float]:
        layer = module.get_submodule(name)
        dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
        return layer.lora_A["default"].out_features, layer.scaling["default"], dropout

    assert facts("blocks.0.attn2.to_k") == (2, 1.0, 0.5)
    assert facts("blocks.1.attn2.to_k") == (3, 1.0, 0.5)
    assert facts("blocks.0.attn1.to_k") == (4, 1.0, 0.5)
    assert facts("blocks.1.attn1.to_v") == (1, 1.0, 0.5)
    assert facts("blocks.1.attn1.to_q") == (4, 9 / 4, 0.0)
    assert facts("blocks.1.attn1.to_out.0") == (4, 1.0, 0.2)
    assert len(tiny.trained(module)) == 32


@pytest.mark.parametrize("key", ["lora_rank_pattern", "lora_alpha_pattern", "lora_dropout_pattern"])
def test_a_name_without_a_layer_is_refused_with_the_near_one(tiny: Any, tmp_path: Path, key: str):
    with pytest.raises(ConfigError, match=rf"{key} = 'attn2\.to_kk'.*Did you mean attn2\.to_k\?"):
        tiny.set_up(tmp_path, lora_rank=4, **{key: {"attn2.to_kk": 0.5 if "drop" in key else 2}})
    with pytest.raises(ConfigError, match="no layer of transformer with an adapter"):
        tiny.set_up(tmp_path, lora_rank=4, **{key: {"ffn.net.2": 0.5 if "drop" in key else 2}})


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_patterns_and_magnitudes_and_no_dropout(
    tiny: Any, tmp_path: Path, dora: bool
):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    plugin, run = tiny.set_up(tmp_path, use_dora=dora, **{**PATTERNS, "lora_dropout_pattern": None})
    module = run.model.modules["transformer"]
    tiny.train(module)
    plugin.save_weights(run, tmp_path)
    fresh = tiny.transformer()
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=fresh,
        scheduler=UniPCMultistepScheduler(),
    )  # fmt: skip
    with torch.no_grad():
        base, ours = tiny.predict(fresh), tiny.predict(module)
        pipe.load_lora_weights(tmp_path)
        theirs = tiny.predict(fresh)
    change = (ours - base).abs().max()
    assert change > 1e-3
    assert (theirs - ours).abs().max() <= 1e-5 * change


def test_dora_starts_without_effect_and_trains_lengths(tiny: Any, tmp_path: Path):
    model = tiny.stand_in()
    with torch.no_grad():
        base = tiny.predict(model.modules["transformer"])
    _, run = tiny.set_up(tmp_path, model, lora_rank=4, use_dora=True)
    module = run.model.modules["transformer"]
    with torch.no_grad():  # a division by the norm rounds
        assert (tiny.predict(module) - base).abs().max() <= 1e-5 * base.abs().max()
    lengths = {n: v.detach().clone() for n, v in tiny.trained(module).items() if "magnitude" in n}
    assert len(lengths) == 16
    losses = tiny.train(module)
    assert losses[-1] < losses[0]
    after = tiny.trained(module)
    assert all(not torch.equal(after[name], value) for name, value in lengths.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_and_patterns_restore_bit_for_bit(tiny: Any, tmp_path: Path, dtype: torch.dtype):
    def fresh() -> Any:
        model = tiny.stand_in("transformer", "transformer_2")
        for module in model.modules.values():
            module.to(dtype)
        run = tiny.make_run(tmp_path, dtype)
        keys = {**PATTERNS, "lora_dropout_pattern": None}
        return tiny.set_up(tmp_path, model, run, use_dora=True, **keys)

    plugin, run = fresh()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in run.model.modules:
            for value in tiny.trained(run.model.modules[role]).values():
                value.copy_(1 + torch.rand(value.shape, generator=draw))
    assert plugin.save_weights(run, tmp_path) == [
        FILE,
        "pytorch_lora_weights_transformer_2.safetensors",
    ]
    other, resumed = fresh()
    assert other.load_weights(resumed, tmp_path) is True
    for role in run.model.modules:
        old, new = (tiny.trained(one.model.modules[role]) for one in (run, resumed))
        assert len(old) == 3 * 16
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_file_with_other_patterns_is_refused(tiny: Any, tmp_path: Path):
    plugin, run = tiny.set_up(tmp_path, lora_rank=4, lora_rank_pattern={"to_k": 2})
    plugin.save_weights(run, tmp_path)
    other, resumed = tiny.set_up(tmp_path, lora_rank=4, lora_rank_pattern={"to_k": 3})
    with pytest.raises(CheckpointError, match="rank_pattern is"):
        other.load_weights(resumed, tmp_path)
    dora, resumed = tiny.set_up(tmp_path, lora_rank=4, lora_rank_pattern={"to_k": 2}, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora is False in the file and True in this run"):
        dora.load_weights(resumed, tmp_path)


def test_the_metadata_tell_where_a_file_comes_from(tiny: Any, tmp_path: Path):
    plugin, run = tiny.set_up(tmp_path, lora_rank=4)
    run.trained_steps, run.settings_digest = 12, "abc"
    plugin.save_weights(run, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        told = file.metadata()
    wanted = {"adapter": "LoRA", "rank": "4", "alpha": "4", "trained_steps": "12",
              "settings_digest": "abc", "flavour": "tiny", "expert": "transformer"}  # fmt: skip
    assert wanted.items() <= told.items()
    assert json.loads(told["lora_adapter_metadata"])["transformer.r"] == 4


def test_comfyui_format_needs_a_model_that_knows_the_names(tiny: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lora_format = 'comfyui'.*Write diffusers"):
        tiny.set_up(tmp_path, lora_rank=4, lora_format="comfyui")
