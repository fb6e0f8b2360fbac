"""The authors' names of Wan's layers, against diffusers' converters in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer_core.capabilities import NativeNames
from trainer_core.errors import CheckpointError, ModelError
from trainer_wan.names import AuthorsNames, layers_of, native_name, read_lora


def linear_layers(**more: Any) -> list[str]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=12, out_channels=16,
        text_dim=32, freq_dim=64, **more,
    )  # fmt: skip
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


T2V = {"in_channels": 16}
I2V = {"in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 48}


@pytest.mark.parametrize("shape", [T2V, I2V], ids=["t2v", "i2v with CLIP"])
def test_diffusers_converter_of_checkpoints_leads_back_to_every_layer(shape: dict[str, Any]):
    layers = linear_layers(**shape)
    native = {layer: native_name(layer) for layer in layers}
    assert layers_of(list(native.values())) == {name: layer for layer, name in native.items()}
    assert native["blocks.11.attn2.to_out.0"] == "blocks.11.cross_attn.o"
    assert native["blocks.0.ffn.net.0.proj"] == "blocks.0.ffn.0"
    if shape is I2V:
        assert native["blocks.3.attn2.add_k_proj"] == "blocks.3.cross_attn.k_img"


@pytest.mark.parametrize("layer", ["blocks.0.attn3.to_q", "blocks.0.attn1.norm_q", "x", "blocks.0"])
def test_a_layer_without_a_name_is_refused(layer: str):
    with pytest.raises(ModelError, match=f"no name for the layer {layer}"):
        native_name(layer)


def test_wans_model_has_the_capability():
    assert isinstance(AuthorsNames(), NativeNames)


def pair(rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(rank, 48, generator=draw), torch.randn(48, rank, generator=draw)


def test_alpha_is_folded_in_from_tensors_or_from_metadata(tmp_path: Path):
    a, b = pair()
    layers = {"self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
              "self_attn.o": "attn1.to_out.0"}  # fmt: skip
    native = {}
    for name in layers:
        start = f"diffusion_model.blocks.0.{name}"
        native |= {f"{start}.lora_down.weight": a.clone(), f"{start}.lora_up.weight": b.clone()}
        native[f"{start}.alpha"] = torch.tensor(6.0)
    save_file(native, tmp_path / "native.safetensors")
    found = read_lora(tmp_path / "native.safetensors")
    assert set(found) == {f"blocks.0.{name}" for name in layers.values()}
    ours = {f"transformer.blocks.0.attn1.to_q.lora_{p}.weight": v for p, v in (("A", a), ("B", b))}
    arguments = '{"transformer.r": 2, "transformer.lora_alpha": 6}'
    path = tmp_path / "ours.safetensors"
    save_file(ours, path, metadata={"format": "pt", "lora_adapter_metadata": arguments})
    found["ours"] = read_lora(path)["blocks.0.attn1.to_q"]
    for down, up in found.values():
        torch.testing.assert_close(up @ down, 3 * b @ a)


def test_what_diffusers_cannot_read_is_refused(tmp_path: Path):
    a, b = pair()
    cases = {
        "nothing": {"x": torch.zeros(1)},
        "half": {"transformer.blocks.0.attn1.to_q.lora_A.weight": a},
        "unknown": {
            "diffusion_model.blocks.0.self_attn.q.lora_down.weight": a,
            "diffusion_model.blocks.0.self_attn.q.lora_up.weight": b,
            "diffusion_model.nowhere.lora_down.weight": a.clone(),
        },
    }
    for name, tensors in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match="diffusers"):
            read_lora(path)
