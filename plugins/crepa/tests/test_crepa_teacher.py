"""The teacher: DINOv2's own class, tiny and random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer_core import ConfigError
from trainer_crepa.files import REPOSITORIES, WIDTHS, TeacherFiles
from trainer_crepa.teacher import features, grid_for, kept_grid, load
from trainer_crepa.testing import write_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder: Path):
    return load(folder, TeacherFiles(str(folder)).config(), device=CPU)


def test_the_grid_keeps_the_clip_s_ratio():
    assert grid_for(30, 52, image_size=518, patch=14) == (28, 49)
    assert grid_for(37, 37, image_size=518, patch=14) == (37, 37)
    assert grid_for(52, 30, image_size=224, patch=14) == (21, 12)
    assert grid_for(1, 1, image_size=64, patch=14) == (4, 4)
    assert kept_grid((30, 52), (28, 49)) == (28, 49)
    assert kept_grid((4, 4), (37, 37)) == (4, 4)


def test_tokens_are_patches_not_the_class(teacher):
    """O-C8."""
    frame = torch.randint(0, 256, (1, 3, 70, 98), dtype=torch.uint8)
    tokens = teacher.patch_tokens(frame, (5, 7))
    assert tokens.shape == (1, 5, 7, 24)
    pixels = frame.float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    with torch.no_grad():
        whole = teacher.network(pixel_values=(pixels - mean) / std)
    torch.testing.assert_close(tokens.flatten(1, 2), whole.last_hidden_state[:, 1:])
    assert not torch.allclose(tokens.mean((1, 2)), whole.pooler_output, atol=1e-2)


def test_a_mark_is_found_where_it_is(teacher):
    """O-C8: moving a bright patch moves the token that changes most."""
    empty = torch.zeros(1, 3, 70, 98, dtype=torch.uint8)
    plain = teacher.patch_tokens(empty, (5, 7))
    for row, column in ((0, 0), (1, 5), (4, 2)):
        marked = empty.clone()
        marked[..., 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 255
        change = (teacher.patch_tokens(marked, (5, 7)) - plain).norm(dim=-1)[0]
        assert int(change.argmax()) == row * 7 + column


@pytest.mark.parametrize("frames", [1, 5, 17, 73])
def test_one_frame_for_each_latent_frame(teacher, frames):
    """O-C7: frames 0, 4, 8, ...; a clip whose frame f has the colour f shows which were taken."""
    clip = torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    found = features(teacher, clip, stride=4, tokens=(2, 2), image_size=64)
    assert found.shape == ((frames - 1) // 4 + 1, 2, 2, 24)
    assert found.dtype == torch.bfloat16
    for row in range(len(found)):
        frame = clip[4 * row : 4 * row + 1].expand(1, 3, 32, 32)
        alone = features(teacher, frame, stride=4, tokens=(2, 2), image_size=64)
        torch.testing.assert_close(found[row].float(), alone[0].float(), atol=2e-2, rtol=0)
    if frames > 5:
        other = features(teacher, clip[4:5], stride=4, tokens=(2, 2), image_size=64)
        assert not torch.equal(found[0], other[0])


def test_frames_in_portions_give_the_same(teacher):
    clip = torch.randint(0, 256, (17, 3, 32, 32), dtype=torch.uint8)
    options = {"stride": 4, "tokens": (2, 2), "image_size": 64}
    whole, parts = (features(teacher, clip, at_once=n, **options).float() for n in (-1, 2))
    torch.testing.assert_close(whole, parts, atol=2e-2, rtol=0)
    assert torch.equal(features(teacher, clip, **options).float(), whole)


def test_registers_are_no_patches(tmp_path: Path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14,
        num_register_tokens=3,
    )  # fmt: skip
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    teacher = load(tmp_path, TeacherFiles(str(tmp_path)).config(), device=CPU)
    frame = torch.zeros(2, 3, 28, 42, dtype=torch.uint8)
    assert teacher.patch_tokens(frame, (2, 3)).shape == (2, 2, 3, 24)


def test_names_stand_for_repositories():
    assert TeacherFiles("dinov2_vitg14").source == "facebook/dinov2-giant"
    assert TeacherFiles("dinov2_vitg14").width() == 1536
    assert TeacherFiles("dinov2_vits14").patch() == 14
    assert set(WIDTHS) == set(REPOSITORIES.values())


def test_a_local_folder_is_read_without_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    files = TeacherFiles(str(folder))
    assert (files.width(), files.patch(), files.folder()) == (24, 14, folder)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda f: None, "holds no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "of type 'clip'"),
        (lambda f: (f / "config.json").write_text('{"model_type": "dinov2"}'), "no safetensors"),
    ],
)
def test_what_is_no_teacher_is_refused(tmp_path: Path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=words):
        TeacherFiles(str(tmp_path)).folder()


def test_a_pickle_is_never_loaded(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, a pickle"):
        TeacherFiles(str(tmp_path)).folder()


def test_a_name_that_is_nothing_is_refused_at_once():
    with pytest.raises(ConfigError, match="dinov2_vitg14"):
        TeacherFiles("no such folder").check()
