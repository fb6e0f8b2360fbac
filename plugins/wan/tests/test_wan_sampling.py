"""Samples against stock ``WanPipeline``, and that making them leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from trainer_core.errors import ConfigError
from trainer_core.types import Prompt
from trainer_wan import Wan
from trainer_wan.sampling import settle

KEYS = {
    "validation_resolution": "48x32",
    "validation_num_video_frames": 5,
    "validation_num_inference_steps": 3,
    "validation_guidance": 4.0,
    "validation_seed": 7,
    "validation_negative_prompt": "blurry",
}


@pytest.fixture
def stock(checkpoint):
    pipeline = WanPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make_ready(make_run, stock):
    """Return a maker of (plugin, run) with a loaded model, prompts and encoded captions."""

    def make(texts=("a red circle",), **keys):
        plugin, run = Wan(), make_run(**{**KEYS, **keys})
        run.spec = plugin.describe_model(run)
        run.model = plugin.load_model(run)
        run.prompts = tuple(Prompt(f"p{i}", text) for i, text in enumerate(texts))
        asked = []

        def read(caption):
            asked.append(caption)
            length = len(stock.tokenizer(caption).input_ids)
            with torch.no_grad():
                embeds, _ = stock.encode_prompt(
                    caption, do_classifier_free_guidance=False, max_sequence_length=512
                )
            return {"text_embeds": embeds[0, :length]}

        run.set_captions(read)
        run.asked = asked
        return plugin, run

    return make


@pytest.mark.parametrize("shift", [None, 5.0])
def test_a_sample_equals_the_stock_pipelines(make_ready, stock, shift):
    plugin, run = make_ready(flow_schedule_shift=shift)
    (artifact,) = plugin.validate(run)
    stock.scheduler = type(stock.scheduler).from_config(
        stock.scheduler.config, flow_shift=shift or 3.0
    )
    expected = stock(
        "a red circle", negative_prompt="blurry", width=48, height=32, num_frames=5,
        num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip
    assert (artifact.name, artifact.caption, artifact.fps) == ("p0", "a red circle", 16)
    assert artifact.frames.shape == (5, 32, 48, 3)
    assert artifact.frames.dtype == np.uint8
    difference = np.abs(artifact.frames / 255 - expected)
    assert difference.max() <= 0.51 / 255  # rounding to 8 bits
    assert expected.std() > 0.01


def test_without_guidance_there_is_no_negative_pass(make_ready):
    plugin, run = make_ready(validation_guidance=1.0)
    calls = []
    run.model.modules["transformer"].proj_out.register_forward_hook(lambda *_: calls.append(1))
    plugin.validate(run)
    assert len(calls) == 3
    assert run.asked == ["a red circle"]


def test_guidance_changes_the_sample(make_ready):
    frames = []
    for guidance in (1.0, 6.0):
        plugin, run = make_ready(validation_guidance=guidance)
        frames.append(plugin.validate(run)[0].frames)
    assert not np.array_equal(*frames)


def test_every_prompt_and_every_time_has_the_same_noise(make_ready):
    plugin, run = make_ready(texts=("a red circle", "a red circle"))
    first, second = plugin.validate(run)
    (again, _) = plugin.validate(run)
    assert np.array_equal(first.frames, second.frames)
    assert np.array_equal(first.frames, again.frames)
    plugin, run = make_ready(validation_seed=8)
    assert not np.array_equal(plugin.validate(run)[0].frames, first.frames)


def test_no_trace_is_left(make_ready):
    plugin, run = make_ready(model_type="full")
    network = run.model.networks["transformer"]
    network.transformer.blocks[1].eval()  # modes that are not all alike
    modes = [module.training for module in network.modules()]
    before = torch.get_rng_state()
    plugin.validate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_without_prompts_nothing_is_rendered(make_ready):
    plugin, run = make_ready(texts=())
    assert plugin.validate(run) == []


def test_sizes_and_lengths_are_made_legal_and_it_is_said_once(make_ready):
    keys = {"validation_resolution": "840x485", "validation_num_video_frames": 80}
    _, run = make_ready(**keys, validation_seed=None, seed=11)
    for _ in range(2):
        sampling = settle(run, {"flow_shift": 3.0})
    assert (sampling.width, sampling.height, sampling.frames) == (832, 480, 77)
    assert (sampling.seed, sampling.shift) == (11, 3.0)
    assert [line.split(" = ")[0] for line in run.said] == [
        "validation_num_video_frames", "validation_resolution"
    ]  # fmt: skip


def test_a_size_below_one_token_is_refused(make_ready):
    _, run = make_ready(validation_resolution="8x480")
    with pytest.raises(ConfigError, match=r"validation_resolution = '8x480'.*16"):
        settle(run, {})
