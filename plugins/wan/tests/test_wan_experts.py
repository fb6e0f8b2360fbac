"""Which expert a flavour trains, on which noise levels, and what is told of a mix-up."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer_core.errors import ConfigError, ModelError
from trainer_wan import Wan
from trainer_wan.config import WanSettings
from trainer_wan.experts import named_in
from trainer_wan.flavours import FLAVOURS

T2V = "t2v-14b-2.2"


def plugin_of(**keys):
    return Wan(WanSettings(**keys))


@pytest.mark.parametrize(
    ("name", "ranges", "sentence"),
    [
        (f"{T2V}-high", [("transformer", 0.875, 1)], "high-noise expert, t in [875, 1000]"),
        (f"{T2V}-low", [("transformer_2", 0, 0.875)], "low-noise expert, t in [0, 875]"),
        ("i2v-14b-2.2-high", [("transformer", 0.9, 1)], "high-noise expert, t in [900, 1000]"),
        ("i2v-14b-2.2-low", [("transformer_2", 0, 0.9)], "low-noise expert, t in [0, 900]"),
        (
            f"{T2V}-both",
            [("transformer", 0.875, 1), ("transformer_2", 0, 0.875)],
            "high-noise expert, t in [875, 1000] and low-noise expert, t in [0, 875]",
        ),
    ],
)
def test_expert_range_and_sentence_follow_the_flavour(make_run, name, ranges, sentence):
    """Of the known repository, without asking the hub."""
    spec = Wan().describe_model(make_run(pretrained_model_name_or_path=None, model_flavour=name))
    assert [(e.role, e.sigma_min, e.sigma_max) for e in spec.experts] == ranges
    assert sentence in spec.sentence


def test_the_boundary_is_that_of_the_weights(make_run, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(f"{T2V}-high"), tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.5}))
    run = make_run(pretrained_model_name_or_path=str(folder), model_flavour=f"{T2V}-low")
    spec = Wan().describe_model(run)
    assert [(e.role, e.sigma_max) for e in spec.experts] == [("transformer_2", 0.5)]
    assert "t in [0, 500]" in spec.sentence


@pytest.mark.parametrize(
    ("stage", "roles"),
    [
        ("high", ["transformer"]),
        ("low", ["transformer_2"]),
        ("both", ["transformer", "transformer_2"]),
    ],
)
def test_the_weights_of_each_role_are_those_of_its_folder(make_run, checkpoints, stage, roles):
    folder = checkpoints(f"{T2V}-high")
    run = make_run(pretrained_model_name_or_path=str(folder), model_flavour=f"{T2V}-{stage}")
    plugin = Wan()
    run.spec = plugin.describe_model(run)
    model = plugin.load_model(run)
    assert list(model.modules) == list(model.networks) == roles
    for role in roles:
        stored = load_file(folder / role / "diffusion_pytorch_model.safetensors")
        live = model.modules[role].state_dict()
        assert all(torch.equal(live[name], value) for name, value in stored.items())
    first, second = (
        load_file(folder / role / "diffusion_pytorch_model.safetensors")["proj_out.weight"]
        for role in ("transformer", "transformer_2")
    )
    assert not torch.equal(first, second), "the two would not be told apart"


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "transformer"),
        ("models/Wan2.2/low_noise_model", "transformer_2"),
        ("someone/Wan-low-tune", "transformer_2"),
        ("someone/model/transformer_2", "transformer_2"),
        ("low_noise/high_noise_model", "transformer"),
        ("someone/highlight-slow", None),
        ("high-and-low.safetensors", None),
        ("someone/tune", None),
    ],
)
def test_the_words_of_a_path(path, role):
    assert named_in(path) == role


@pytest.fixture
def swapped(checkpoints, tmp_path):
    """A pipeline whose transformer_2 was overwritten with transformer."""
    folder = shutil.copytree(checkpoints(f"{T2V}-high"), tmp_path / "same")
    shutil.copytree(folder / "transformer", folder / "transformer_2", dirs_exist_ok=True)
    return folder


def loaded(plugin, run):
    run.spec = plugin.describe_model(run)
    return plugin.load_model(run)


def test_two_experts_that_are_one_are_refused(make_run, swapped):
    run = make_run(pretrained_model_name_or_path=str(swapped), model_flavour=f"{T2V}-low")
    with pytest.raises(ConfigError, match=r"transformer/ and transformer_2/ hold the same weights"):
        loaded(Wan(), run)


def tuned(checkpoints, target, role, amount):
    """Write a fine-tune of one expert, as a single file, and return it."""
    source = checkpoints(f"{T2V}-high") / role / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: value + amount * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in load_file(source).items()
    }
    save_file(tensors, target)
    return str(target)


@pytest.mark.parametrize("role", ["transformer", "transformer_2"])
def test_a_fine_tune_of_the_other_expert_is_told_by_its_numbers(
    make_run, checkpoints, tmp_path, role
):
    file = tuned(checkpoints, tmp_path / "tune.safetensors", role, 0.1)
    base = {"pretrained_model_name_or_path": str(checkpoints(f"{T2V}-high"))}
    own, other = ("high", "low") if role == "transformer" else ("low", "high")
    plugin = plugin_of(pretrained_transformer_model_name_or_path=file)
    run = make_run(model_flavour=f"{T2V}-{own}", **base)
    loaded(plugin, run)
    assert run.said == []
    run = make_run(model_flavour=f"{T2V}-{other}", **base)
    with pytest.raises(ConfigError, match=rf"nearer to the {own}-noise expert.*{T2V}-{own}"):
        loaded(plugin_of(pretrained_transformer_model_name_or_path=file), run)


def test_what_cannot_be_told_is_said(make_run, checkpoints, tmp_path):
    file = tuned(checkpoints, tmp_path / "far.safetensors", "transformer", 50.0)
    run = make_run(
        model_flavour=f"{T2V}-high", pretrained_model_name_or_path=str(checkpoints(f"{T2V}-high"))
    )
    loaded(plugin_of(pretrained_transformer_model_name_or_path=file), run)
    assert ["nothing tells which expert" in line for line in run.said] == [True]


def test_a_path_that_names_the_other_expert_is_refused_before_anything_is_read(
    make_run, checkpoints, tmp_path
):
    file = tmp_path / "wan2.2_low_noise_tune.safetensors"
    file.write_bytes(b"never read")
    run = make_run(
        model_flavour=f"{T2V}-high", pretrained_model_name_or_path=str(checkpoints(f"{T2V}-high"))
    )
    plugin = plugin_of(pretrained_transformer_model_name_or_path=str(file))
    with pytest.raises(ConfigError, match=r"names the low-noise expert, but t2v-14b-2\.2-high"):
        plugin.describe_model(run)


def test_one_file_for_both_experts_is_refused(make_run, checkpoints, tmp_path):
    file = tuned(checkpoints, tmp_path / "tune.safetensors", "transformer", 0.1)
    run = make_run(
        model_flavour=f"{T2V}-both", pretrained_model_name_or_path=str(checkpoints(f"{T2V}-high"))
    )
    plugin = plugin_of(pretrained_transformer_model_name_or_path=file)
    with pytest.raises(ConfigError, match=r"names one transformer, but .* trains two"):
        plugin.describe_model(run)


def test_a_flavour_of_one_expert_refuses_a_pipeline_of_two(make_run, checkpoints):
    run = make_run(pretrained_model_name_or_path=str(checkpoints(f"{T2V}-high")))
    with pytest.raises(ConfigError, match=r"have boundary_ratio 0\.875, which no Wan 2\.1 T2V"):
        Wan().describe_model(run)


def test_a_pipeline_without_the_second_expert_is_refused(make_run, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(f"{T2V}-high"), tmp_path / "copy")
    shutil.rmtree(folder / "transformer_2")
    run = make_run(pretrained_model_name_or_path=str(folder), model_flavour=f"{T2V}-low")
    with pytest.raises(ModelError, match=r"holds no transformer_2/config\.json"):
        Wan().describe_model(run)


@pytest.mark.parametrize(
    ("flavour", "keys", "says"),
    [
        (None, {"wan_validation_load_other_stage": True}, "the model has one expert"),
        (f"{T2V}-both", {"wan_validation_load_other_stage": True}, "both experts are loaded"),
        (f"{T2V}-low", {"wan_first_frame_probability": 1.0}, r"it is for ti2v-5b-2\.2"),
        (None, {"wan_validation_image": "image.png"}, "begin from text alone"),
        ("i2v-14b-2.1", {"wan_validation_last_image": "image.png"}, "end with no given frame"),
        (None, {"pretrained_transformer_subfolder": "none"}, "is not set"),
    ],
)
def test_keys_without_effect_are_refused(make_run, flavour, keys, says):
    run = make_run(model_flavour=flavour)
    with pytest.raises(ConfigError, match=says):
        plugin_of(**keys).describe_model(run)


@pytest.mark.parametrize("stage", ["high", "low"])
def test_the_expert_that_is_not_trained_may_be_missing_unless_it_is_needed(
    make_run, checkpoints, tmp_path, stage
):
    folder = shutil.copytree(checkpoints(f"{T2V}-high"), tmp_path / "one")
    missing = "transformer_2" if stage == "high" else "transformer"
    shutil.rmtree(folder / missing)
    keys = {"model_flavour": f"{T2V}-{stage}", "pretrained_model_name_or_path": str(folder)}
    loaded(Wan(), make_run(**keys))
    for more, own, says in (
        ({"model_type": "full"}, {}, "model_type = full needs"),
        ({}, {"wan_validation_load_other_stage": True}, "wan_validation_load_other_stage needs"),
    ):
        with pytest.raises(ConfigError, match=f"holds no {missing}/, which {says}"):
            plugin_of(**own).describe_model(make_run(**keys, **more))


@pytest.mark.parametrize("why", ["trains all weights", "moves the blocks one by one"])
def test_one_expert_at_a_time_needs_weights_that_nobody_else_holds(make_run, why):
    """Who moves blocks says so in its own check, behind the description of the model."""
    from dataclasses import replace

    run = make_run(
        model_flavour=f"{T2V}-both", model_type="full" if "trains" in why else "lora",
        pretrained_model_name_or_path=None,
    )  # fmt: skip
    plugin = plugin_of(wan_one_expert_resident=True)
    act = plugin.describe_model
    if "moves" in why:
        act(run)
        act = plugin.encoders
        run.placement = replace(run.placement, blocks=torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"wan_one_expert_resident.*{why}"):
        act(run)


def test_every_staged_flavour_has_a_boundary():
    for flavour in FLAVOURS.values():
        assert (flavour.boundary is None) == (flavour.stage is None)
