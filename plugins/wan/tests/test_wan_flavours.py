"""Which weights a flavour takes, and what is said about others."""

from __future__ import annotations

import json

import pytest

from trainer_core.errors import ConfigError, ModelError
from trainer_wan import Wan
from trainer_wan.checks import check_repo, check_weights
from trainer_wan.flavours import FLAVOURS, Shape, choose

T2V_1_3B, T2V_14B = choose(None), choose("t2v-480p-14b-2.1")


def config_of(name, **changes):
    return {**vars(FLAVOURS[name].shape), **changes}


def test_the_default_flavour():
    assert T2V_1_3B.name == "t2v-480p-1.3b-2.1"
    assert T2V_1_3B.repo == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert T2V_14B.repo == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def test_an_unknown_flavour_gets_a_did_you_mean():
    with pytest.raises(ConfigError, match=r"Did you mean t2v-480p-14b-2\.1\?"):
        choose("t2v-480p-14b")


def test_real_weights_of_the_flavour_are_taken():
    for flavour in FLAVOURS.values():
        index = {"boundary_ratio": flavour.boundary}
        check_weights(flavour, config=config_of(flavour.name), index=index, source="folder")


def test_a_config_without_channels_means_what_diffusers_defaults_to():
    assert Shape.of({}) == T2V_14B.shape


@pytest.mark.parametrize(
    ("flavour", "config", "index", "belongs"),
    [
        (T2V_1_3B, config_of("t2v-480p-14b-2.1"), {}, "t2v-480p-14b-2.1"),
        (T2V_14B, config_of("t2v-480p-1.3b-2.1"), {}, "t2v-480p-1.3b-2.1"),
        (T2V_14B, config_of("t2v-480p-14b-2.1"), {"boundary_ratio": 0.875}, "t2v-14b-2.2-high"),
        (T2V_14B, config_of("i2v-14b-2.1"), {}, "i2v-14b-2.1 or i2v-14b-2.1-720p"),
        (T2V_14B, config_of("flf2v-14b-2.1"), {}, "flf2v-14b-2.1"),
        (T2V_1_3B, config_of("ti2v-5b-2.2"), {}, "ti2v-5b-2.2"),
    ],
)
def test_weights_of_another_flavour_are_refused_naming_both_keys_and_the_repo(
    flavour, config, index, belongs
):
    with pytest.raises(ConfigError) as error:
        check_weights(flavour, config=config, index=index, source="folder")
    text = str(error.value)
    assert "model_flavour" in text
    assert "pretrained_model_name_or_path = 'folder'" in text
    assert flavour.repo in text
    assert belongs in text


@pytest.mark.parametrize(
    ("change", "index", "says"),
    [
        ({"in_channels": 36}, {}, "in_channels 36"),
        ({"in_channels": 48, "out_channels": 48}, {}, "in_channels 48"),
        ({"image_dim": 1280}, {}, "image_dim 1280"),
        ({}, {"boundary_ratio": 0.9}, "boundary_ratio 0.9"),
        ({"pos_embed_seq_len": 514}, {}, "pos_embed_seq_len 514"),
    ],
)
def test_tiny_weights_of_another_kind_are_refused(change, index, says):
    tiny = config_of(T2V_1_3B.name, num_layers=2, num_attention_heads=2)
    check_weights(T2V_1_3B, config=tiny, index={}, source="tiny")
    with pytest.raises(ConfigError, match=says):
        check_weights(T2V_1_3B, config={**tiny, **change}, index=index, source="tiny")


def test_a_known_repository_is_judged_by_its_name():
    assert check_repo(T2V_1_3B, T2V_1_3B.repo)
    assert not check_repo(T2V_1_3B, "someone/fine-tune")
    with pytest.raises(ConfigError, match=r"holds Wan 2\.1 T2V 14B.*t2v-480p-14b-2\.1"):
        check_repo(T2V_1_3B, T2V_14B.repo)


def test_describe_model_checks_a_folder(make_run, checkpoint, tmp_path):
    spec = Wan().describe_model(make_run())
    assert (spec.fps, spec.frame_stride, spec.alignment, spec.patch) == (16, 4, 16, (4, 16, 16))
    assert [(e.role, e.sigma_min, e.sigma_max) for e in spec.experts] == [("transformer", 0, 1)]
    assert spec.sizes == ((832, 480), (480, 832))
    assert spec.sentence == "Wan 2.1 T2V 1.3B, all noise levels, LoRA"
    assert spec.tokens(81, 480, 832) == 32760

    folder = tmp_path / "big"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    config = config_of("t2v-480p-14b-2.1")
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    run = make_run(pretrained_model_name_or_path=str(folder))
    with pytest.raises(ConfigError, match=r"holds Wan 2\.1 T2V 14B, not Wan 2\.1 T2V 1\.3B"):
        Wan().describe_model(run)


def test_the_14b_flavour_was_trained_at_720p_too(make_run):
    run = make_run(pretrained_model_name_or_path=None, model_flavour="t2v-480p-14b-2.1")
    spec = Wan().describe_model(run)
    assert (1280, 720) in spec.sizes
    assert spec.sentence == "Wan 2.1 T2V 14B, all noise levels, LoRA"


def test_a_path_that_is_not_there_is_refused(make_run):
    run = make_run(pretrained_model_name_or_path="./models/wan")
    with pytest.raises(ModelError, match=r"'\./models/wan' is neither a folder that is there"):
        Wan().describe_model(run)


def test_a_folder_in_another_layout_is_refused(make_run, tmp_path):
    run = make_run(pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=r"holds no transformer/config\.json.*diffusers layout"):
        Wan().describe_model(run)
