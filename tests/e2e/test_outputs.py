"""What a run leaves: files that other programs take, losses that fall, caches that are reused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import av
import pytest
import torch
from support import Command

FINAL = "pytorch_lora_weights.safetensors"
LENGTH = (
    "--max_train_steps", "60", "--learning_rate", "0.01", "--gradient_accumulation_steps", "1",
    "--lora_dropout", "0", "--checkpoint_step_interval", "30", "--eval_steps_interval", "30",
)  # fmt: skip
TRACKER = "tensorboard" if importlib.util.find_spec("trainer_tensorboard") else "none"
SAMPLES = (
    "--validation_prompt", "a red circle moves left", "--validation_step_interval", "60",
    "--validation_resolution", "32x32", "--validation_num_video_frames", "9",
    "--validation_num_inference_steps", "2", "--validation_guidance", "2",
    "--report_to", TRACKER,
)  # fmt: skip


@pytest.fixture(scope="module")
def stdout(world: Path, module_trainer: Command) -> str:
    return module_trainer(
        "run", "--plugins", "wan", "--output_dir", "full", *LENGTH, *SAMPLES
    ).stdout


@pytest.fixture(scope="module")
def output(world: Path, stdout: str) -> Path:
    return world / "full"


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


def test_plugins_are_printed_with_their_reasons(stdout: str):
    assert "plugin wan: named in --plugins" in stdout
    assert "plugin lora: lora_type is standard" in stdout
    assert "plugin umt5: required by wan" in stdout


def test_training_and_held_out_loss_fall(output: Path):
    losses = [event["loss"] for event in events(output, "step")]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    held_out = [event["eval/held-out"] for event in events(output, "eval")]
    assert len(held_out) == 3
    assert held_out[-1] < 0.95 * held_out[0]


def test_everything_is_where_the_readme_says(output: Path):
    assert (output / FINAL).is_file()
    assert (output / "ema" / FINAL).is_file()
    assert list(output.glob("checkpoint-*/manifest.json"))
    found = list(output.glob("tensorboard/**/events.out.tfevents.*"))
    assert bool(found) == (TRACKER != "none")
    assert json.loads((output / "settings.json").read_text())["settings"]["lora_rank"] == 4


def test_samples_play_and_there_is_a_contact_sheet(output: Path):
    videos = sorted(output.glob("validation/**/*.mp4"))
    assert [v.parent.name for v in videos] == ["step-00000000"] + ["step-00000060"] * 2
    for path in videos:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec.name, stream.width, stream.height) == ("h264", 32, 32)
            assert sum(1 for _ in container.decode(stream)) == 9
    assert len(list(output.glob("validation/*/contact_sheet.png"))) == 2


def test_the_lora_loads_in_diffusers_changes_the_output_and_unloads_bit_for_bit(
    world: Path, output: Path
):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(world / "model")
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a red circle", height=32, width=32, num_frames=5, num_inference_steps=2,
            guidance_scale=1.0, generator=generator, output_type="latent",
        ).frames  # fmt: skip

    base = sample()
    pipeline.load_lora_weights(output, weight_name=FINAL)
    changed = sample()
    pipeline.unload_lora_weights()
    assert float((changed - base).abs().max()) > 1e-3
    assert torch.equal(sample(), base)


def test_a_second_run_into_a_new_folder_reuses_every_cache(trainer: Command, output: Path):
    done = trainer("run", "--output_dir", "again", "--max_train_steps", "1", *SAMPLES)
    lines = [line for line in done.stdout.splitlines() if line.startswith("cache of")]
    assert all(line.endswith(" 0 encoded") for line in lines)
    assert len(lines) == 2


def test_a_key_of_a_plugin_outside_the_run_is_reported_once(trainer: Command):
    done = trainer("check", "--model_type", "full", "--lora_rank", "3")
    assert done.stdout.count("no effect") == 1
    assert "lora_rank" in done.stdout


def test_a_full_fine_tune_resumes_and_leaves_a_pipeline(world: Path, trainer: Command):
    from diffusers import WanPipeline

    common = ("--model_type", "full", "--gradient_checkpointing", "true", "--report_to", "none")
    trainer("run", "--output_dir", "whole", "--max_train_steps", "4", *common)
    trainer("run", "--output_dir", "parts", "--max_train_steps", "3", *common)
    done = trainer("run", "--output_dir", "parts", "--max_train_steps", "4", *common)
    assert "Going on from parts/checkpoint-3" in done.stdout
    whole = sorted((world / "whole").rglob("*.safetensors"))
    assert len(whole) > 3
    for path in whole:
        relative = path.relative_to(world / "whole")
        assert path.read_bytes() == (world / "parts" / relative).read_bytes(), relative
    folder = next((world / "whole").rglob("model_index.json")).parent
    tuned = WanPipeline.from_pretrained(folder).transformer.state_dict()
    base = WanPipeline.from_pretrained(world / "model").transformer.state_dict()
    assert any(not torch.equal(tuned[name], base[name]) for name in base)
