"""Every flavour trains, resumes, renders, and gives files that diffusers loads: tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_wan import Wan
from trainer_wan.flavours import FLAVOURS, Flavour

umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
clip = pytest.importorskip("trainer_clip")

PLUGINS = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "clip": clip.Clip}
STEPS = 5
KEYS = {
    "model_type": "lora",
    "lora_rank": 2,
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "checkpoint_step_interval": 2,
    "validation_prompt": "a red circle",
    "validation_step_interval": STEPS,
    "validation_num_inference_steps": 2,
    "validation_num_video_frames": 5,
    "validation_resolution": "32x32",
    "validation_guidance": 1.0,
    "disable_benchmark": True,
    "use_ema": True,
    "eval_timesteps": 1,
    "learning_rate": 0.01,
}
FILES = {
    "transformer": "pytorch_lora_weights.safetensors",
    "transformer_2": "pytorch_lora_weights_transformer_2.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def made() -> dict[str, Finished]:
    return {}


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> Flavour:
    return FLAVOURS[request.param]


def keys_of(flavour: Flavour, checkpoints: Any, **more: Any) -> dict[str, Any]:
    keys = {"model_flavour": flavour.name, **KEYS}
    if flavour.task == "ti2v":
        keys["wan_first_frame_probability"] = 0.5
    if flavour.stage == "both":
        keys["flow_schedule_shift"] = 8.0  # without it one step in 70 is the high-noise expert's
    return {**keys, "pretrained_model_name_or_path": str(checkpoints(flavour.name)), **more}


@pytest.fixture
def finished(folder, made, checkpoints, flavour) -> Finished:
    if flavour.name not in made:
        keys, named = keys_of(flavour, checkpoints), ["wan", "lora"]
        made[flavour.name] = train(
            folder, plugins=PLUGINS, named=named, settings=keys, output=flavour.name, num_held_out=1
        )
    return made[flavour.name]


def test_it_trains_in_its_range_and_renders(finished: Finished, flavour: Flavour):
    assert [event["step"] for event in finished.steps] == list(range(1, STEPS + 1))
    assert len({event["loss"] for event in finished.steps}) == STEPS
    (line,) = [line for line in finished.said if line.startswith(f"model {flavour.name}: ")]
    low = 0.0 if flavour.stage != "high" else flavour.boundary
    high = 1.0 if flavour.stage != "low" else flavour.boundary
    assert all(low <= s <= high for draw in finished.draws for s in draw.sigma)
    drawn = {"transformer" if s >= (flavour.boundary or 0) else "transformer_2"
             for draw in finished.draws for s in draw.sigma}  # fmt: skip
    assert drawn == set(flavour.roles)
    if flavour.stage in ("high", "low"):
        assert f"{flavour.stage}-noise expert, t in [{1000 * low:g}, {1000 * high:g}]" in line
    (rendered,) = [event for event in finished.events if event["kind"] == "validation"]
    assert rendered["step"] == STEPS
    assert rendered["files"] == ["contact_sheet", "validation", "validation-ema"]
    measured = [event["eval/eval"] for event in finished.events if event["kind"] == "eval"]
    assert len(set(measured)) == 2, "before and after training"
    assert ("clip" in finished.host.plugins) == flavour.uses_clip
    assert sorted(finished.weights()) == sorted(
        [*(FILES[r] for r in flavour.roles), *(f"ema/{FILES[r]}" for r in flavour.roles)]
    )


def test_interrupted_it_ends_with_the_same_bits(folder, checkpoints, finished, flavour):
    keys = keys_of(flavour, checkpoints)
    for crash in (4, None):
        done = attempt(
            folder, plugins=PLUGINS, named=["wan", "lora"], settings=keys,
            output=f"{flavour.name}-again", crash_at=crash, num_held_out=1,
        )  # fmt: skip
        assert crash is None or isinstance(done.error, Interrupted)
    if done.error is not None:
        raise done.error
    assert {draw.step for draw in done.draws} == {3, 4, 5}
    assert done.steps == finished.steps
    assert done.weights() == finished.weights()


def test_its_files_load_into_diffusers_and_predict_the_same(finished, checkpoints, flavour):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(checkpoints(flavour.name))
    for role in flavour.roles:
        pipeline.load_lora_weights(
            finished.folder, weight_name=FILES[role], load_into_transformer_2=role != "transformer"
        )
        theirs, inputs = getattr(pipeline, role), example(flavour)
        plain = type(theirs).from_pretrained(checkpoints(flavour.name) / role)
        with torch.no_grad():
            before = plain(**inputs, return_dict=False)[0]
            merge(plain, load_file(finished.folder / FILES[role]))
            found, expected = (m(**inputs, return_dict=False)[0] for m in (theirs, plain))
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= 1e-5 * scale
        assert (before - expected).abs().max() > 1e-4 * scale, "the adapter does something"


def test_its_exports_load_into_diffusers_and_predict_the_same(finished, checkpoints, flavour):
    """ComfyUI's and diffusers' files, through diffusers' own loader, as the run's own file."""
    from diffusers import DiffusionPipeline

    for format in ("comfyui", "diffusers"):
        written = export_of(finished, format)
        assert [one.num_layers for one in written] == [2 * 2 * 4] * len(flavour.roles)
        for role, one in zip(flavour.roles, written, strict=True):
            found = []
            for path in (one.path, finished.folder / FILES[role]):
                pipeline = DiffusionPipeline.from_pretrained(checkpoints(flavour.name))
                second = role != "transformer"
                pipeline.load_lora_weights(
                    path.parent, weight_name=path.name, load_into_transformer_2=second
                )
                with torch.no_grad():
                    inputs = example(flavour)
                    found.append(getattr(pipeline, role)(**inputs, return_dict=False)[0])
            assert torch.allclose(*found, rtol=0, atol=1e-5 * float(found[1].abs().max()))


def export_of(finished: Finished, format: str) -> list[Any]:
    from trainer_core.catalogue import Catalogue
    from trainer_core.exporting import Wanted, export, settings_of
    from trainer_core.plugins import build

    catalogue = Catalogue.of(PLUGINS)
    resolved = settings_of(finished.folder, args=(), catalogue=catalogue)
    host = build(resolved, catalogue=catalogue)
    return export(resolved, host, Wanted(finished.folder, format), say=lambda _: None)


def merge(transformer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Add B A to each weight, as the paper says; alpha is the rank."""
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    assert len(downs) == 2 * 2 * 4  # layers, attentions, projections
    for down in downs:
        up = down.replace(".lora_A.", ".lora_B.")
        layer = transformer.get_submodule(down.split(".", 1)[1].removesuffix(".lora_A.weight"))
        layer.weight += tensors[up] @ tensors[down]


def example(flavour: Flavour) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    inputs = {
        "hidden_states": draw(1, flavour.shape.in_channels, 2, 4, 4),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": draw(1, 512, 32),
    }
    if flavour.uses_clip:
        images = len(flavour.given_frames)
        inputs["encoder_hidden_states_image"] = draw(images, 257, 16)
    return inputs
