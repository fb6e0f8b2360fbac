"""The adapter's file: in diffusers' own loader, by the formula, and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from trainer_core.errors import CheckpointError
from trainer_core.run import Run
from trainer_lora import Lora

FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (8, 2), (3, 4.5)])
def test_diffusers_loads_the_file_and_gives_the_same_output(
    tiny: Any, tmp_path: Path, rank: int, alpha: float | None
) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    plugin, run = tiny.set_up(tmp_path, lora_rank=rank, lora_alpha=alpha)
    module = run.model.modules["transformer"]
    tiny.train(module)
    assert plugin.save_weights(run, tmp_path) == [FILE]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing temporary stays
    tensors = load_file(tmp_path / FILE)
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    assert {value.dtype for value in tensors.values()} == {torch.float32}

    fresh = tiny.transformer()
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=fresh,
        scheduler=UniPCMultistepScheduler(),
    )  # fmt: skip
    with torch.no_grad():
        base, ours = tiny.predict(fresh), tiny.predict(module)
        pipe.load_lora_weights(tmp_path)
        theirs = tiny.predict(fresh)
        pipe.unload_lora_weights()
        unloaded = tiny.predict(fresh)
    change = (ours - base).abs().max()
    assert change > 1e-3
    assert (theirs - ours).abs().max() <= 1e-5 * change
    assert torch.equal(unloaded, base)


def test_the_file_alone_gives_the_weights_by_the_formula(tiny: Any, tmp_path: Path) -> None:
    plugin, run = tiny.set_up(tmp_path, lora_rank=4, lora_alpha=6)
    module = run.model.modules["transformer"]
    tiny.train(module)
    plugin.save_weights(run, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        arguments = json.loads(file.metadata()["lora_adapter_metadata"])
        layer = "transformer.blocks.1.attn2.to_v"
        a, b = (file.get_tensor(f"{layer}.lora_{part}.weight") for part in "AB")
    assert (arguments["transformer.r"], arguments["transformer.lora_alpha"]) == (4, 6)
    live = module.blocks[1].attn2.to_v
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    change = live(x) - live.base_layer(x)
    torch.testing.assert_close(x @ (6 / 4 * b @ a).T, change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_weights_restores_bit_for_bit(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    roles = ("transformer", "transformer_2")

    def fresh() -> tuple[Lora, Run]:
        model = tiny.stand_in(*roles)
        for module in model.modules.values():
            module.to(dtype)
        return tiny.set_up(
            tmp_path, model, tiny.make_run(tmp_path, dtype), lora_rank=2, lora_alpha=3
        )

    plugin, run = fresh()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles:
            for value in tiny.trained(run.model.modules[role]).values():
                value.copy_(torch.randn(value.shape, generator=draw))
    names = plugin.save_weights(run, tmp_path / "new" / "folder")
    assert names == [FILE, "pytorch_lora_weights_transformer_2.safetensors"]
    other, resumed = fresh()
    assert other.load_weights(resumed, tmp_path / "new" / "folder") is True
    for role in roles:
        old, new = (tiny.trained(one.model.modules[role]) for one in (run, resumed))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
        assert all(value.dtype == dtype for value in new.values())


def test_the_second_expert_loads_into_diffusers_second_transformer(
    tiny: Any, tmp_path: Path
) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    plugin, run = tiny.set_up(tmp_path, tiny.stand_in("transformer", "transformer_2"), lora_rank=2)
    second = run.model.modules["transformer_2"]
    tiny.train(second)
    names = plugin.save_weights(run, tmp_path)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(),
        transformer=tiny.transformer(0), transformer_2=tiny.transformer(1), boundary_ratio=0.875,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name=names[1], load_into_transformer_2=True)
    with torch.no_grad():
        torch.testing.assert_close(tiny.predict(pipe.transformer_2), tiny.predict(second))


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        arguments = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(path)
    change(tensors, arguments)
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(arguments)})


LAYER = "transformer.blocks.0.attn1.to_q"
DAMAGE: dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]] = {
    "alpha": lambda t, m: m.update({"transformer.lora_alpha": 1}),
    "no metadata": lambda t, m: m.clear(),
    "one value": lambda t, m: t[f"{LAYER}.lora_A.weight"][0, 0].add_(1e-6),
    "swapped": lambda t, m: t.update(
        {f"{LAYER}.lora_A.weight": t["transformer.blocks.1.attn1.to_q.lora_A.weight"].clone()}
    ),
    "a layer lacks": lambda t, m: t.pop(f"{LAYER}.lora_B.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_reading_back_finds_every_kind_of_damage(tiny: Any, tmp_path: Path, damage: str) -> None:
    from trainer_lora.files import FileError, verify

    plugin, run = tiny.set_up(tmp_path, lora_rank=2, lora_alpha=3)
    module = run.model.modules["transformer"]
    tiny.train(module, steps=1)
    plugin.save_weights(run, tmp_path)
    verify(tmp_path / FILE, module, plugin.shape)
    _edit(tmp_path / FILE, DAMAGE[damage])
    with pytest.raises(FileError, match="read back"):
        verify(tmp_path / FILE, module, plugin.shape)


def test_live_scale_that_the_file_does_not_tell_is_found(tiny: Any, tmp_path: Path) -> None:
    plugin, run = tiny.set_up(tmp_path, lora_rank=2)
    module = run.model.modules["transformer"]
    tiny.train(module, steps=1)
    plugin.save_weights(run, tmp_path)
    good = (tmp_path / FILE).read_bytes()
    module.blocks[0].attn1.to_q.scaling["default"] = 0.5
    with pytest.raises(CheckpointError, match=r"not written.*change of blocks\.0\.attn1\.to_q"):
        plugin.save_weights(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == good


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"lora_rank": 4}, "r is 2 in the file and 4 in this run"),
        ({"lora_rank": 2, "lora_alpha": 1}, "lora_alpha is 2 in the file and 1 in this run"),
        ({"lora_rank": 2, "peft_lora_target_modules": "to_q,to_k,to_v"}, "does not train"),
        (
            {"lora_rank": 2, "peft_lora_target_modules": "to_q,to_k,to_v,to_out.0,ffn.net.2"},
            r"lacks blocks\.0\.ffn\.net\.2\.lora_A\.weight and 3 more",
        ),
    ],
)
def test_a_file_of_another_adapter_is_refused(
    tiny: Any, tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    plugin, run = tiny.set_up(tmp_path, lora_rank=2)
    plugin.save_weights(run, tmp_path)
    other, resumed = tiny.set_up(tmp_path, **keys)
    before = {k: v.clone() for k, v in tiny.trained(resumed.model.modules["transformer"]).items()}
    with pytest.raises(CheckpointError, match=says):
        other.load_weights(resumed, tmp_path)
    after = tiny.trained(resumed.model.modules["transformer"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_and_cut_files_are_refused(tiny: Any, tmp_path: Path) -> None:
    plugin, run = tiny.set_up(tmp_path, lora_rank=2)
    with pytest.raises(CheckpointError, match="holds no " + FILE):
        plugin.load_weights(run, tmp_path)
    plugin.save_weights(run, tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        plugin.load_weights(run, tmp_path)
