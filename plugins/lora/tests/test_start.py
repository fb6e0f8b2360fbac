"""init_lora: a run starts from a LoRA that is there, a T2V one on an I2V model too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_core.errors import ConfigError

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def trained(tiny: Any, tmp_path: Path) -> Path:
    """A LoRA that was trained on a T2V transformer, alpha half of its rank."""
    plugin, run = tiny.set_up(tmp_path, lora_rank=4, lora_alpha=2)
    tiny.train(run.model.modules["transformer"])
    plugin.save_weights(run, tmp_path / "t2v")
    return tmp_path / "t2v" / FILE


def changes(module: Any) -> dict[str, torch.Tensor]:
    from trainer_lora.adapter import adapted, change

    return {name: change(layer) for name, layer in adapted(module)}


def i2v(tiny: Any) -> Any:
    """A transformer with CLIP, as Wan 2.1's I2V has it: 36 channels in, keys and values of images."""
    from diffusers import WanTransformer3DModel

    model = tiny.stand_in()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.modules["transformer"] = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=2, in_channels=36,
            out_channels=16, text_dim=32, freq_dim=64, image_dim=40, added_kv_proj_dim=48,
        ).eval()  # fmt: skip
    model.networks["transformer"].module = model.modules["transformer"]
    return model


def test_a_t2v_lora_starts_an_i2v_run_and_loads_into_diffusers_i2v_pipeline(
    tiny: Any, tmp_path: Path, trained: Path
):
    model = i2v(tiny)
    _, run = tiny.set_up(tmp_path, model, lora_rank=4, lora_alpha=2, init_lora=str(trained))
    module = run.model.modules["transformer"]
    ours = changes(module)
    stored = load_file(trained)
    assert len(ours) == 16
    for name, change in ours.items():
        a, b = (stored[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(change, 0.5 * (b @ a))
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=draw),
        "encoder_hidden_states_image": torch.randn(1, 257, 40, generator=draw),
    }

    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    stock = i2v(tiny).modules["transformer"]
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=stock, image_encoder=None,
        image_processor=None, scheduler=UniPCMultistepScheduler(),
    )  # fmt: skip
    with torch.no_grad():
        base = stock(**inputs, return_dict=False)[0]
        pipe.load_lora_weights(trained.parent, weight_name=FILE)
        theirs = stock(**inputs, return_dict=False)[0]
        mine = module(**inputs, return_dict=False)[0]
    change = (theirs - base).abs().max()
    assert change > 1e-3
    assert (mine - theirs).abs().max() <= 1e-5 * change


def test_layers_beyond_the_file_start_without_effect_and_it_is_said(
    tiny: Any, tmp_path: Path, trained: Path
):
    run = tiny.make_run(tmp_path)
    said: list[str] = []
    run.say = said.append
    targets = "to_q,to_k,to_v,to_out.0,add_k_proj,add_v_proj"
    tiny.set_up(
        tmp_path, i2v(tiny), run, lora_rank=4, lora_alpha=2, init_lora=str(trained),
        peft_lora_target_modules=targets,
    )  # fmt: skip
    found = changes(run.model.modules["transformer"])
    empty = {name for name, change in found.items() if not change.any()}
    assert empty == {f"blocks.{n}.attn2.add_{p}_proj" for n in (0, 1) for p in "kv"}
    assert said == [
        f"transformer starts from 16 layers of {trained}, "
        "which lacks blocks.0.attn2.add_k_proj and 3 more."
    ]


@pytest.mark.parametrize(
    "keys", [{"lora_alpha": 2}, {"lora_alpha": 8}, {"lora_alpha": 2, "use_dora": True}]
)
def test_the_start_is_the_files_change_whatever_the_scale(
    tiny: Any, tmp_path: Path, trained: Path, keys: dict[str, Any]
):
    _, before = tiny.set_up(tmp_path, lora_rank=4, lora_alpha=2, init_lora=str(trained))
    wanted = changes(before.model.modules["transformer"])
    _, run = tiny.set_up(tmp_path, lora_rank=4, init_lora=str(trained), **keys)
    module = run.model.modules["transformer"]
    for name, change in changes(module).items():
        limit = 1e-6 if "use_dora" not in keys else 1e-4  # the magnitude is float32
        assert (change - wanted[name]).abs().max() <= limit * wanted[name].abs().max()
    losses = tiny.train(module)
    assert losses[-1] < losses[0]


def test_a_dora_goes_on_as_one(tiny: Any, tmp_path: Path):
    plugin, run = tiny.set_up(tmp_path, lora_rank=4, use_dora=True)
    tiny.train(run.model.modules["transformer"])
    plugin.save_weights(run, tmp_path)
    wanted = changes(run.model.modules["transformer"])
    path = str(tmp_path / FILE)
    _, again = tiny.set_up(tmp_path, lora_rank=4, use_dora=True, init_lora=path)
    found = changes(again.model.modules["transformer"])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ConfigError, match=r"is a DoRA\. Set use_dora to true"):
        tiny.set_up(tmp_path, lora_rank=4, init_lora=path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"lora_rank": 8}, "has rank 4 at blocks.* the run 8.*Set lora_rank to 4"),
        (
            {"lora_rank": 4, "peft_lora_target_modules": "to_q"},
            r"Add attn1\.to_k to peft_lora_target",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tiny: Any, tmp_path: Path, trained: Path, keys: dict[str, Any], says: str
):
    with pytest.raises(ConfigError, match=says):
        tiny.set_up(tmp_path, init_lora=str(trained), **keys)


def test_a_file_of_another_model_or_of_nothing_is_refused(tiny: Any, tmp_path: Path, trained: Path):
    tensors = load_file(trained)
    foreign = {k.replace("blocks.1.", "blocks.9."): v for k, v in tensors.items()}
    short = {k: v[:, :40].clone() if "lora_A" in k else v for k, v in tensors.items()}
    cases = {
        "changes blocks.9.*which the model does not have": foreign,
        r"changes a weight \(48, 40\) at .*where the model has \(48, 48\)": short,
        "holds no LoRA layer": {"x": torch.zeros(1)},
        "lacks blocks": {k: v for k, v in tensors.items() if "lora_A" in k},
    }
    for number, (says, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path)
        with pytest.raises(ConfigError, match=says):
            tiny.set_up(tmp_path, lora_rank=4, init_lora=str(path))
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ConfigError, match="cannot be read"):
        tiny.set_up(tmp_path, lora_rank=4, init_lora=str(tmp_path / "text.safetensors"))


def test_a_file_that_is_not_there_is_told_before_anything_is_loaded(tiny: Any, tmp_path: Path):
    from trainer_lora import Lora
    from trainer_lora.config import LoraSettings

    plugin = Lora(LoraSettings(init_lora="gone.safetensors"))
    with pytest.raises(
        ConfigError, match=r"init_lora = 'gone\.safetensors': there is no such file"
    ):
        plugin.check(tiny.make_run(tmp_path))
    plugin.check(tiny.make_run(tmp_path, model_type="full"))


def test_a_file_under_the_authors_names_has_its_own_scales_and_lengths():
    from trainer_lora.start import UnfitError, native_layers

    a, b, one = torch.ones(2, 3), torch.ones(4, 2), torch.tensor(1.0)
    plain = {"lora_down.weight": a, "lora_up.weight": b}
    found = native_layers({
        "x": plain, "y": {**plain, "alpha": one},
        "z": {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": torch.ones(4, 1)},
    })  # fmt: skip
    assert [found[name].scale for name in "xyz"] == [1.0, 0.5, 1.0]
    assert found["x"].magnitude is None
    assert found["z"].magnitude.shape == (4,)
    with pytest.raises(UnfitError, match="has lokr_w1 for x instead of a LoRA's two matrices"):
        native_layers({"x": {"lokr_w1": a, "lokr_w2": b}})
