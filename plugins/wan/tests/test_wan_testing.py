"""The tiny checkpoint that demos and tests start from."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image

from trainer_wan.flavours import FLAVOURS
from trainer_wan.testing import main, write_checkpoint


def digests(folder):
    from trainer_core.files import digest_file

    return {str(p.relative_to(folder)): digest_file(p) for p in folder.rglob("*") if p.is_file()}


def test_the_same_arguments_give_the_same_bits_and_leave_no_trace(checkpoint, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state()
        again = write_checkpoint(tmp_path / "again", layers=3)
        assert torch.equal(torch.get_rng_state(), before)
    assert digests(again) == digests(checkpoint)


def test_the_seed_matters_and_the_command_line_works(checkpoint, tmp_path, capsys):
    main(["checkpoint", str(tmp_path / "other"), "--layers", "2", "--seed", "1"])
    assert "2 layers" in capsys.readouterr().out
    name = "text_encoder/model.safetensors"
    assert digests(tmp_path / "other")[name] != digests(checkpoint)[name]
    assert len(WanPipeline.from_pretrained(tmp_path / "other").transformer.blocks) == 2


def test_an_unknown_flavour_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["checkpoint", str(tmp_path), "--flavour", "ti2v-5b-2.1"])


@pytest.mark.parametrize("name", FLAVOURS)
def test_each_flavours_tiny_checkpoint_is_the_pipeline_that_its_weights_say(checkpoints, name):
    """Diffusers picks the class by itself and runs it."""
    folder, flavour = checkpoints(name), FLAVOURS[name]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.transformer_2 is not None) == (flavour.stage is not None)
    assert pipeline.config.boundary_ratio == flavour.boundary
    assert pipeline.config.expand_timesteps == (flavour.task == "ti2v")
    size = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2}
    images = {}
    for key, frame in zip(("image", "last_image"), flavour.given_frames, strict=False):
        shade = 40 if frame == "first" else 200
        images[key] = Image.new("RGB", (64, 32), (shade, 80, 120))
    frames = pipeline(prompt="a red circle", **images, **size).frames
    assert frames.shape == (1, 5, 32, 64, 3)
    assert frames.std() > 0.01


def test_the_stock_pipeline_runs_it_and_reads_any_text(checkpoint):
    pipeline = WanPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    text = "两只猫 & a <b>café</b>"
    ids = pipeline.tokenizer(text).input_ids
    assert ids[-1] == pipeline.tokenizer.eos_token_id
    assert pipeline.tokenizer.unk_token_id not in ids
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == text
    frames = pipeline(text, height=32, width=48, num_frames=9, num_inference_steps=2).frames
    assert frames.shape == (1, 9, 32, 48, 3)
    assert frames.std() > 0.01
