"""Weights from elsewhere: repositories, folders and single files, and what does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_core.errors import ConfigError, ModelError
from trainer_wan import Wan
from trainer_wan.config import WanSettings

STORED = "diffusion_pytorch_model.safetensors"
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
IN_A_BLOCK = {
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}


def original_name(name: str) -> str:
    """Return the name of a tensor in the files of Wan's authors."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in ORIGINAL.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    if ".norm2." in name:  # there the norm before cross-attention is the third
        return name.replace(".norm2.", ".norm3.")
    for ours, theirs in IN_A_BLOCK.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture
def tuned(checkpoints, tmp_path):
    """Other weights of the shape of a flavour's transformer, as a folder without its subfolder."""

    def make(flavour: str, role: str = "transformer"):
        folder = shutil.copytree(checkpoints(flavour) / role, tmp_path / "tuned")
        tensors = {k: v + 0.125 for k, v in load_file(folder / STORED).items()}
        save_file(tensors, folder / STORED)
        return folder, tensors

    return make


def loaded(make_run, checkpoints, flavour=None, **keys):
    folder = checkpoints(flavour or "t2v-480p-1.3b-2.1")
    plugin = Wan(WanSettings(**keys))
    run = make_run(pretrained_model_name_or_path=str(folder), model_flavour=flavour)
    run.spec = plugin.describe_model(run)
    run.model = plugin.load_model(run)
    return plugin, run


def holds(run, tensors, role="transformer"):
    live = run.model.modules[role].state_dict()
    assert live.keys() == tensors.keys()
    assert all(torch.equal(live[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("subfolder", ["none", "None", "transformer", None, "deep/place"])
def test_a_folder_with_its_subfolder_or_none(make_run, checkpoints, tuned, tmp_path, subfolder):
    folder, tensors = tuned("t2v-480p-1.3b-2.1")
    if subfolder not in ("none", "None"):
        target = tmp_path / "moved" / (subfolder or "transformer")
        folder = shutil.copytree(folder, target).parents[
            len(target.relative_to(tmp_path).parts) - 2
        ]
    keys = {"pretrained_transformer_model_name_or_path": str(folder)}
    if subfolder is not None:
        keys["pretrained_transformer_subfolder"] = subfolder
    _, run = loaded(make_run, checkpoints, **keys)
    holds(run, tensors)


@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "i2v-14b-2.1"])
def test_a_single_file(make_run, checkpoints, tuned, tmp_path, names, prefix, flavour):
    _, tensors = tuned(flavour)
    rename = original_name if names == "original" else str
    stored = {f"{prefix}{rename(name)}": value for name, value in tensors.items()}
    assert len(stored) == len(tensors)
    save_file(stored, tmp_path / "one.safetensors")
    _, run = loaded(
        make_run, checkpoints, flavour,
        pretrained_transformer_model_name_or_path=str(tmp_path / "one.safetensors"),
    )  # fmt: skip
    holds(run, tensors)


def test_in_bfloat16_a_single_file_keeps_in_float32_what_a_folder_keeps(
    make_run, checkpoints, tmp_path
):
    from trainer_wan.loading import load_transformer
    from trainer_wan.weights import Weights

    base = checkpoints("t2v-480p-1.3b-2.1")
    dtypes = []
    for own in (None, str(base / "transformer" / STORED)):
        files = Weights(str(base), transformer=own).transformer("transformer")
        model, cured = load_transformer(files, dtype=torch.bfloat16)
        assert cured == []
        dtypes.append({name: value.dtype for name, value in model.state_dict().items()})
    assert dtypes[0] == dtypes[1]
    assert len(set(dtypes[0].values())) == 2


def test_low_noise_weights_come_from_the_second_folder_by_themselves(make_run, checkpoints):
    folder = checkpoints("t2v-14b-2.2-low")
    _, run = loaded(
        make_run, checkpoints, "t2v-14b-2.2-low",
        pretrained_transformer_model_name_or_path=str(folder),
    )  # fmt: skip
    holds(run, load_file(folder / "transformer_2" / STORED), role="transformer_2")


# --- the VAE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [True, False])
def test_a_vae_from_elsewhere_encodes_and_is_exported(make_run, checkpoints, tmp_path, below):
    folder = tmp_path / "other" / ("vae" if below else "")
    shutil.copytree(checkpoints("t2v-480p-1.3b-2.1") / "vae", folder, dirs_exist_ok=True)
    tensors = {k: v * 1.5 for k, v in load_file(folder / STORED).items()}
    save_file(tensors, folder / STORED)
    plugin = Wan(WanSettings(pretrained_vae_model_name_or_path=str(tmp_path / "other")))
    base = checkpoints("t2v-480p-1.3b-2.1")
    run = make_run(pretrained_model_name_or_path=str(base), model_type="full")
    run.spec = plugin.describe_model(run)
    (encoder,) = plugin.encoders(run)
    (plain,) = Wan().encoders(run)
    assert encoder.identity()["weights"] != plain.identity()["weights"]
    live = encoder.load().state_dict()
    assert all(torch.equal(live[name], value) for name, value in tensors.items())
    run.model = plugin.load_model(run)
    plugin.save_weights(run, tmp_path / "final", final=True)
    written = load_file(tmp_path / "final" / "pipeline" / "vae" / STORED)
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_a_vae_of_other_channels_is_refused_naming_key_and_cure(make_run, checkpoints):
    vae = str(checkpoints("ti2v-5b-2.2"))
    plugin = Wan(WanSettings(pretrained_vae_model_name_or_path=vae))
    base = str(checkpoints("t2v-480p-1.3b-2.1"))
    with pytest.raises(ConfigError) as error:
        plugin.describe_model(make_run(pretrained_model_name_or_path=base))
    key, _, told = str(error.value).strip().partition(": ")
    assert key.startswith(f"pretrained_vae_model_name_or_path = '{vae[:20]}")  # long paths are cut
    assert told == (
        "its VAE makes latents of 48 channels (z_dim), t2v-480p-1.3b-2.1 takes 16. Take the VAE of "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
    )


# --- what does not fit --------------------------------------------------------------------------


def spoilt(folder, name, change):
    tensors = load_file(folder / STORED)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / STORED)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(make_run, checkpoints, tuned):
    folder, _ = tuned("t2v-480p-1.3b-2.1")
    spoilt(folder, "blocks.1.attn1.to_q.weight", lambda t: t[:-1])
    keys = {
        "pretrained_transformer_model_name_or_path": str(folder),
        "pretrained_transformer_subfolder": "none",
    }
    with pytest.raises(ModelError) as error:
        loaded(make_run, checkpoints, **keys)
    assert str(error.value) == (
        f"the weights of {folder} do not fit the model: blocks.1.attn1.to_q.weight is (47, 48), it "
        "must be (48, 48). Set model_flavour to what the weights are, or name other weights."
    )


TIME = "condition_embedder.time_embedder.linear_1.weight"


def test_a_time_embedding_that_does_not_fit_names_the_flag_which_cures_it(
    make_run, checkpoints, tuned
):
    folder, tensors = tuned("t2v-480p-1.3b-2.1")
    spoilt(folder, TIME, lambda t: torch.cat([t, t], 1))
    keys = {
        "pretrained_transformer_model_name_or_path": str(folder),
        "pretrained_transformer_subfolder": "none",
    }
    with pytest.raises(ModelError) as error:
        loaded(make_run, checkpoints, **keys)
    for part in (TIME, "(48, 128)", "(48, 64)", "Set wan_force_2_1_time_embedding to true"):
        assert part in str(error.value)
    _, run = loaded(make_run, checkpoints, wan_force_2_1_time_embedding=True, **keys)
    base = load_file(checkpoints("t2v-480p-1.3b-2.1") / "transformer" / STORED)
    expected = {name: base[name] if ".time_" in name else value for name, value in tensors.items()}
    holds(run, expected)
    assert any("the time embedding, 6 tensors, comes from" in line for line in run.said)


def test_the_flag_says_where_it_changes_nothing(make_run, checkpoints):
    _, run = loaded(make_run, checkpoints, wan_force_2_1_time_embedding=True)
    assert any("wan_force_2_1_time_embedding changes nothing" in line for line in run.said)


def test_weights_of_another_member_are_refused_naming_their_own_key(
    make_run, checkpoints, tmp_path
):
    keys = {"pretrained_transformer_model_name_or_path": str(checkpoints("i2v-14b-2.2-high"))}
    with pytest.raises(
        ConfigError, match=r"weights of pretrained_transformer_model_name_or_path = "
    ):
        loaded(make_run, checkpoints, **keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"pretrained_transformer_model_name_or_path": "a/b.safetensors"}, "there is no such file"),
        ({"pretrained_transformer_model_name_or_path": "./x"}, "pretrained_transformer_model_name"),
        ({"pretrained_vae_model_name_or_path": "./x"}, "pretrained_vae_model_name_or_path = './x'"),
    ],
)
def test_a_place_that_is_not_there_is_an_error_of_its_key(make_run, checkpoints, keys, says):
    with pytest.raises(ModelError, match=says):
        loaded(make_run, checkpoints, **keys)


def test_a_pickle_is_never_loaded(make_run, checkpoints, tuned):
    folder, _ = tuned("t2v-480p-1.3b-2.1")
    (folder / STORED).rename(folder / "model.bin")
    keys = {
        "pretrained_transformer_model_name_or_path": str(folder),
        "pretrained_transformer_subfolder": "none",
    }
    with pytest.raises(ModelError, match=r"model\.bin, a pickle, which is never loaded"):
        loaded(make_run, checkpoints, **keys)


def test_a_config_is_read_beside_the_weights(make_run, checkpoints, tuned):
    """A fine-tune of more layers than the pipeline's own transformer."""
    folder, _ = tuned("t2v-480p-1.3b-2.1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    tensors = load_file(folder / STORED)
    more = {
        k.replace("blocks.1.", "blocks.2."): v.clone()
        for k, v in tensors.items()
        if "blocks.1." in k
    }
    save_file({**tensors, **more}, folder / STORED)
    keys = {
        "pretrained_transformer_model_name_or_path": str(folder),
        "pretrained_transformer_subfolder": "none",
    }
    _, run = loaded(make_run, checkpoints, **keys)
    assert run.spec.num_blocks == 3
    holds(run, {**tensors, **more})
