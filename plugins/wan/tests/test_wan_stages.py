"""Text-to-video with two experts, and TI2V 5B from text alone: samples against stock ``WanPipeline``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from trainer_core.types import Prompt
from trainer_wan import Wan
from trainer_wan.config import WanSettings

SIZE = {
    "validation_resolution": "64x32",
    "validation_num_video_frames": 9,
    "validation_num_inference_steps": 5,
    "validation_guidance": 4.0,
    "validation_seed": 7,
}


@pytest.fixture
def make_samples(make_run, checkpoints):
    """Return a maker of (our frames, the stock pipeline)."""

    def make(name: str, **keys):
        folder = checkpoints(name)
        stock = WanPipeline.from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        plugin = Wan(WanSettings(**keys))
        run = make_run(pretrained_model_name_or_path=str(folder), model_flavour=name, **SIZE)
        run.spec = plugin.describe_model(run)
        run.model = plugin.load_model(run)
        run.prompts = (Prompt("p", "a red circle"),)

        def read(caption):
            with torch.no_grad():
                embeds, _ = stock.encode_prompt(caption, do_classifier_free_guidance=False)
            return {"text_embeds": embeds[0]}

        run.set_captions(read)
        plugin.attach(run)
        (artifact,) = plugin.validate(run)
        return artifact.frames, stock

    return make


def stock_frames(stock) -> np.ndarray:
    return stock(
        "a red circle", height=32, width=64, num_frames=9, num_inference_steps=5,
        guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip


def equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours / 255 - theirs).max() <= 0.51 / 255)  # rounding to 8 bits


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("t2v-14b-2.2-high", {"wan_validation_load_other_stage": True}),
        ("t2v-14b-2.2-low", {"wan_validation_load_other_stage": True}),
        (
            "t2v-14b-2.2-low",
            {"wan_validation_load_other_stage": True, "wan_one_expert_resident": True},
        ),
        ("t2v-14b-2.2-both", {}),
        ("t2v-14b-2.2-both", {"wan_one_expert_resident": True}),
        ("ti2v-5b-2.2", {}),
        ("ti2v-5b-2.2", {"wan_force_2_1_time_embedding": True}),
    ],
)
def test_samples_equal_the_stock_pipelines(make_samples, name, keys):
    ours, stock = make_samples(name, **keys)
    expected = stock_frames(stock)
    assert equal(ours, expected)
    assert expected.std() > 0.01
    if "14b" in name:  # both experts were at work
        stock.transformer, stock.transformer_2 = stock.transformer_2, stock.transformer
        assert not equal(ours, stock_frames(stock))


@pytest.mark.parametrize(
    ("name", "role"), [("t2v-14b-2.2-high", "transformer"), ("t2v-14b-2.2-low", "transformer_2")]
)
def test_without_the_other_stage_the_trained_expert_draws_alone(make_samples, name, role):
    ours, stock = make_samples(name)
    assert not equal(ours, stock_frames(stock))
    stock.transformer = getattr(stock, role)
    stock.register_to_config(boundary_ratio=None)
    assert equal(ours, stock_frames(stock))
