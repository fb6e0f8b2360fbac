"""Given frames: condition tensors, prediction and samples against diffusers' own pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from trainer_core.types import (
    EncoderSample,
    ForwardPlan,
    LoadedEncoder,
    ModelInputs,
    Moment,
    Prompt,
)
from trainer_wan import Wan
from trainer_wan.condition import given_mask
from trainer_wan.config import WanSettings
from trainer_wan.flavours import choose

clip_plugin = pytest.importorskip("trainer_clip")

FLAVOURS = ["i2v-14b-2.1", "flf2v-14b-2.1", "i2v-14b-2.2-high", "i2v-14b-2.2-low", "ti2v-5b-2.2"]
HEIGHT, WIDTH = 32, 64
BOUND = 2e-6
"""Largest difference of predictions, as a share of the expected tensor's maximum."""


def clip(frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    shape = (frames, 3, HEIGHT, WIDTH)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def image(frame: torch.Tensor) -> Image.Image:
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


@pytest.fixture
def make_world(make_run, checkpoints):
    """Return a maker of (run, plugins, stock pipeline, encode) for a flavour."""

    def make(name: str, **keys):
        folder = checkpoints(name)
        own = {"wan_first_frame_probability": 1.0} if name.startswith("ti2v") else {}
        settings = {k: v for k, v in keys.items() if k in WanSettings.model_fields}
        plugin = Wan(WanSettings(**own, **settings))
        rest = {k: v for k, v in keys.items() if k not in settings}
        run = make_run(
            pretrained_model_name_or_path=str(folder), model_flavour=name, vae_batch_size=2, **rest
        )
        run.spec = plugin.describe_model(run)
        plugins = [plugin, clip_plugin.Clip()]

        def encode(pixels, names):
            found = {}
            for owner in plugins:
                for encoder in owner.encoders(run):
                    loaded = LoadedEncoder(encoder, encoder.load())
                    sample = EncoderSample(pixels=pixels)
                    (result,) = owner.encode_batch(run, loaded, [sample])
                    found |= {k: v for k, v in result.items() if k in names}
            return found

        run.set_clips(encode, lambda: clip())
        stock = WanImageToVideoPipeline.from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        return run, plugin, stock, encode

    return make


def stock_condition(stock, pixels, frames, generator=None):
    """Return what the pipeline itself makes of a clip's given frames."""
    prepare = stock.video_processor.preprocess
    first = prepare(image(pixels[0]), height=HEIGHT, width=WIDTH)
    last = prepare(image(pixels[-1]), height=HEIGHT, width=WIDTH) if "last" in frames else None
    return stock.prepare_latents(
        first, 1, stock.vae.config.z_dim, HEIGHT, WIDTH, len(pixels), torch.float32, "cpu",
        generator, None, last,
    )  # fmt: skip


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("name", FLAVOURS)
def test_condition_tensors_equal_the_pipelines_to_the_bit(make_world, name, frames):
    _, _, stock, encode = make_world(name)
    pixels, flavour = clip(frames), choose(name)
    expected = stock_condition(stock, pixels, flavour.given_frames)[1][0]
    key = "first_frame" if flavour.task == "ti2v" else "condition"
    found = encode(pixels, [key])[key]
    assert found.dtype == torch.float32
    assert found.shape[0] == (48 if flavour.task == "ti2v" else 20)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["i2v-14b-2.1", "flf2v-14b-2.1"])
def test_image_embeddings_equal_the_pipelines_to_the_bit(make_world, name):
    _, _, stock, encode = make_world(name)
    pixels = clip()
    images = [image(pixels[0])] + ([image(pixels[-1])] if name.startswith("flf") else [])
    with torch.no_grad():
        expected = stock.encode_image(images if len(images) > 1 else images[0], "cpu")
    found = encode(pixels, ["image_embeds"])["image_embeds"]
    assert found.shape == (257 * len(images), 16)
    assert torch.equal(found, expected.flatten(0, 1))


def test_models_of_2_2_take_no_image_embeddings(make_world):
    for name in ("i2v-14b-2.2-high", "ti2v-5b-2.2"):
        run, _, _, encode = make_world(name)
        assert "image_embeds" not in encode(clip(), ["image_embeds"])
        assert any("clip has no effect" in line for line in run.said)


def test_only_the_given_frames_matter(make_world):
    """And the last one only where it is given."""
    for name in FLAVOURS:
        _, _, _, encode = make_world(name)
        names = ["condition", "first_frame", "image_embeds"]
        plain, changed, other_end = clip(), clip(), clip()
        changed[1:-1] = 0
        other_end[-1] = 0
        first = encode(plain, names)
        assert first
        assert all(torch.equal(v, first[k]) for k, v in encode(changed, names).items())
        same = [torch.equal(v, first[k]) for k, v in encode(other_end, names).items()]
        assert not any(same) if name.startswith("flf") else all(same), name


def test_the_mask_of_one_frame_and_of_both_ends():
    first = given_mask(3, 1, 1, last=False)[:, :, 0, 0]
    assert first.tolist() == [[1, 0, 0]] * 4
    both = given_mask(3, 1, 1, last=True)[:, :, 0, 0]
    assert both.tolist() == [[1, 0, 0]] * 3 + [[1, 0, 1]]


# --- the model's prediction ---------------------------------------------------------------------


class Call:
    """The first call of the stock transformer: what went in and what came out."""

    def __init__(self, transformer) -> None:
        self.inputs, self.output = None, None
        transformer.register_forward_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs, output):
        if self.inputs is None:
            self.inputs, self.output = kwargs, output[0]


def first_call(stock, name, latents, pixels, steps=2):
    """Run the stock pipeline from given latents and return the first denoising call."""
    flavour = choose(name)
    role = flavour.roles[0]
    call = Call(getattr(stock, role))
    if role == "transformer_2":  # it is called below the boundary
        stock.register_to_config(boundary_ratio=1.1)
    with torch.no_grad():
        stock(
            image(pixels[0]), "a red circle", height=HEIGHT, width=WIDTH, num_frames=len(pixels),
            last_image=image(pixels[-1]) if "last" in flavour.given_frames else None,
            num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="latent",
        )  # fmt: skip
    return call


def inputs_of(latents, t, text, conditioning, role) -> ModelInputs:
    return ModelInputs(
        x0=torch.zeros_like(latents), eps=latents, sigma=t / 1000, t=t, x_t=latents,
        target=torch.full_like(latents, 7.0), loss_weight=torch.ones(len(latents)),
        conditioning={"text_embeds": text, **conditioning}, role=role, moment=Moment(0),
    )  # fmt: skip


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_prediction_equals_the_pipelines_first_denoising_call(make_world, name):
    run, plugin, stock, encode = make_world(name)
    run.model, pixels = plugin.load_model(run), clip()
    factor = stock.vae_scale_factor_spatial
    shape = (1, stock.vae.config.z_dim, 3, HEIGHT // factor, WIDTH // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    call = first_call(stock, name, latents, pixels)
    text, t = call.inputs["encoder_hidden_states"], call.inputs["timestep"].flatten()[-1:]
    names = ["condition", "first_frame", "image_embeds"]
    conditioning = {k: v[None] for k, v in encode(pixels, names).items()}
    inputs = inputs_of(latents, t.float(), text, conditioning, run.spec.experts[0].role)
    found = run.predict(inputs)
    noisy = slice(1, None) if name.startswith("ti2v") else slice(None)
    difference = (found - call.output)[:, :, noisy].abs().max()
    assert difference <= BOUND * call.output.abs().max()
    if name.startswith("ti2v"):
        assert (found[:, :, 0] == 7.0).all(), "the velocity of a given frame is known"
    without = inputs_of(
        latents, t.float(), text, {**conditioning, **spoilt(conditioning)}, inputs.role
    )
    assert (run.predict(without) - call.output)[:, :, noisy].abs().max() > 1e-3


def spoilt(conditioning):
    return {name: tensor.flip(-1) * 1.5 for name, tensor in conditioning.items()}


@pytest.mark.parametrize("name", ["i2v-14b-2.1", "flf2v-14b-2.1"])
def test_the_image_embeddings_matter_on_their_own(make_world, name):
    run, plugin, _, encode = make_world(name)
    run.model = plugin.load_model(run)
    latents = torch.randn((2, 16, 3, 4, 8), generator=torch.Generator().manual_seed(2))
    pixels = (clip(), clip().flip(0))
    conditioning = {
        key: torch.stack([encode(p, [key])[key] for p in pixels])
        for key in ("condition", "image_embeds")
    }
    text = torch.zeros(2, 512, 32)
    inputs = inputs_of(latents, torch.tensor([300.0, 700.0]), text, conditioning, "transformer")
    both = run.predict(inputs)
    for index in range(2):
        one = slice(index, index + 1)
        alone = inputs_of(
            latents[one], inputs.t[one], text[one],
            {k: v[one] for k, v in conditioning.items()}, "transformer",
        )  # fmt: skip
        assert (run.predict(alone) - both[one]).abs().max() <= 1e-5 * both.abs().max()
    swapped = {**inputs.conditioning, "image_embeds": conditioning["image_embeds"].flip(0)}
    assert (run.predict(replace(inputs, conditioning=swapped)) - both).abs().max() > 1e-3


# --- TI2V: which clips have their first frame given --------------------------------------------


def ti2v_inputs(latents, first, step):
    text = torch.zeros(len(latents), 512, 32)
    made = inputs_of(
        latents, torch.full((len(latents),), 600.0), text, {"first_frame": first}, "transformer"
    )
    return replace(made, moment=Moment(step))


def given_in(run, inputs):
    known = run.model._with_given(inputs).conditioning
    return known.get("first_frame_given")


def test_the_share_of_given_first_frames_is_drawn_by_moment_alone(make_world):
    run, plugin, _, _ = make_world("ti2v-5b-2.2")
    plugin.settings = WanSettings(wan_first_frame_probability=0.3)
    run.model = plugin.load_model(run)
    latents, first = torch.zeros(4, 48, 3, 2, 4), torch.zeros(4, 48, 1, 2, 4)
    drawn = [given_in(run, ti2v_inputs(latents, first, step)) for step in range(1, 200)]
    again = [given_in(run, ti2v_inputs(latents, first, step)) for step in range(1, 200)]
    assert all((a is None) == (b is None) for a, b in zip(drawn, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True) if a is not None)
    share = sum(int(d.sum()) for d in drawn if d is not None) / (4 * len(drawn))
    assert 0.22 < share < 0.38
    held_out = given_in(run, ti2v_inputs(latents, first, 0))
    assert held_out.all()
    assert given_in(run, ti2v_inputs(latents[:, :, :1], first, 1)) is None, "one frame is no clip"


def test_given_and_free_clips_of_a_batch_are_those_of_batches_of_one(make_world):
    run, plugin, _, _ = make_world("ti2v-5b-2.2")
    run.model = plugin.load_model(run)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn((2, 48, 3, 2, 4), generator=generator)
    first = torch.randn((2, 48, 1, 2, 4), generator=generator)
    network, inputs = run.model.bare("transformer"), ti2v_inputs(latents, first, 0)
    mixed = {**inputs.conditioning, "first_frame_given": torch.tensor([True, False])}
    with torch.no_grad():
        both, _ = network(replace(inputs, conditioning=mixed), ForwardPlan())
        text = inputs.conditioning["text_embeds"]
        free, _ = network.velocity(latents[1:], inputs.t[1:], text[1:])
        given, _ = network.velocity(
            latents[:1], inputs.t[:1], text[:1], first_frame=first[:1], given=torch.tensor([True])
        )
    assert torch.allclose(both[1:], free, atol=1e-5)
    assert torch.allclose(both[:1, :, 1:], given[:, :, 1:], atol=1e-5)
    assert torch.equal(both[:1, :, :1], inputs.target[:1, :, :1])


def test_token_wise_timesteps_collapse_only_where_they_are_equal(make_world):
    run, plugin, _, _ = make_world("ti2v-5b-2.2", wan_force_2_1_time_embedding=True)
    run.model = plugin.load_model(run)
    network = run.model.bare("transformer")
    assert not network.token_wise
    seen = []
    embedder = network.transformer.condition_embedder.time_embedder
    embedder.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    latents, first = torch.zeros(2, 48, 3, 2, 4), torch.zeros(2, 48, 1, 2, 4)
    inputs = ti2v_inputs(latents, first, 0)
    run.predict(inputs)
    run.predict(replace(inputs, conditioning={"text_embeds": inputs.conditioning["text_embeds"]}))
    assert seen == [(2, 6, 64), (2, 64)]
    network.token_wise = True
    run.predict(replace(inputs, conditioning={"text_embeds": inputs.conditioning["text_embeds"]}))
    assert seen[-1] == (2, 6, 64)


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "both"),
    [
        *((n, False) for n in FLAVOURS[:2]),
        ("i2v-14b-2.2-high", True),
        ("i2v-14b-2.2-low", True),
        ("ti2v-5b-2.2", False),
    ],
)
def test_samples_equal_the_stock_pipelines(make_world, tmp_path, name, both):
    """With the other stage loaded, where there are two: both experts of the folder as they are."""
    pixels, keys = clip(), {}
    for key, place in (("wan_validation_image", 0), ("wan_validation_last_image", -1)):
        if place == 0 or name.startswith("flf"):
            image(pixels[place]).save(tmp_path / f"{key}.png")
            keys[key] = str(tmp_path / f"{key}.png")
    if both:
        keys["wan_validation_load_other_stage"] = True
    size = {
        "validation_resolution": f"{WIDTH}x{HEIGHT}", "validation_num_video_frames": 9,
        "validation_num_inference_steps": 4, "validation_guidance": 4.0, "validation_seed": 7,
    }  # fmt: skip
    run, plugin, stock, _ = make_world(name, **keys, **size)
    run.model = plugin.load_model(run)
    run.prompts = (Prompt("p", "a red circle"),)

    def read(caption):
        with torch.no_grad():
            embeds, _ = stock.encode_prompt(caption, do_classifier_free_guidance=False)
        return {"text_embeds": embeds[0]}

    run.set_captions(read)
    (artifact,) = plugin.validate(run)
    expected = stock(
        image(pixels[0]), "a red circle", height=HEIGHT, width=WIDTH, num_frames=9,
        last_image=image(pixels[-1]) if name.startswith("flf") else None,
        num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip
    difference = np.abs(artifact.frames / 255 - expected)
    assert difference.max() <= 0.51 / 255  # rounding to 8 bits
    assert expected.std() > 0.01


def test_without_an_image_samples_begin_from_a_clip_of_the_data(make_world):
    size = {
        "validation_resolution": "32x32", "validation_num_video_frames": 5,
        "validation_num_inference_steps": 1, "validation_guidance": 1.0,
    }  # fmt: skip
    run, plugin, _, _ = make_world("i2v-14b-2.2-low", **size)
    run.model = plugin.load_model(run)
    run.prompts = (Prompt("p", "a red circle"),)
    run.set_captions(lambda _: {"text_embeds": torch.zeros(1, 32)})
    (artifact,) = plugin.validate(run)
    assert artifact.frames.shape == (5, 32, 32, 3)
    assert any("samples begin from a clip of the data" in line for line in run.said)


def test_an_image_of_another_shape_covers_the_sample_and_a_broken_one_is_named(tmp_path):
    from trainer_core.errors import ConfigError
    from trainer_wan.validation import _fitted, _opened

    wide = Image.new("RGB", (200, 40), (10, 200, 30))
    wide.paste((250, 0, 0), (0, 0, 40, 40))  # cut off: only the middle is kept
    wide.save(tmp_path / "wide.png")
    pixels = _fitted(_opened(str(tmp_path / "wide.png"), 0), (WIDTH, HEIGHT))
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert pixels.float().mean((1, 2)).tolist() == [10, 200, 30]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(
        ConfigError, match=r"wan_validation_last_image = '.*: cannot be read: .*text\.png"
    ):
        _opened(str(tmp_path / "text.png"), -1)
