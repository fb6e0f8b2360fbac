"""Where the image encoder is found, and what it makes of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from trainer_clip import Clip
from trainer_clip.config import ClipSettings
from trainer_clip.files import described, locate
from trainer_clip.vision import load
from trainer_core.errors import ModelError
from trainer_core.run import IMAGE_EMBEDS_OF, Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import EncoderSample, LoadedEncoder, ModelSpec, Placement

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of 16 patches and a class token, in the layout of a pipeline."""
    root = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=56, patch_size=14, projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(root / "image_encoder")
    size = {"height": 56, "width": 56}
    resizing = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size)
    resizing.save_pretrained(root / "image_processor")
    return root


def make_run(folder: Path, tmp_path: Path, *frames: str) -> Run:
    run = Run(
        CoreSettings(pretrained_model_name_or_path=str(folder), cache_dir=str(tmp_path)),
        placement=Placement(CPU, torch.float32, torch.float32), output_dir=tmp_path,
        notify=lambda line: said.append(line),
    )  # fmt: skip
    said: list[str] = []
    run.said = said  # type: ignore[attr-defined]
    run.spec = ModelSpec("model", 16, 4, 16, (4, 16, 16), ())
    if frames:
        run.state[IMAGE_EMBEDS_OF] = frames
    return run


def clip(frames: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (frames, 3, 40, 64), dtype=torch.uint8, generator=generator)


def encoded(run: Run, *clips: torch.Tensor) -> list[torch.Tensor]:
    plugin = Clip()
    (encoder,) = plugin.encoders(run)
    loaded = LoadedEncoder(encoder, encoder.load())
    found = plugin.encode_batch(run, loaded, [EncoderSample(pixels=each) for each in clips])
    assert found is not None
    return [result["image_embeds"] for result in found]


def hidden(folder: Path, *frames: torch.Tensor) -> torch.Tensor:
    """Return the hidden states before the last layer, straight from transformers."""
    from PIL import Image

    model = CLIPVisionModel.from_pretrained(folder / "image_encoder").eval()
    resizing = CLIPImageProcessor.from_pretrained(folder / "image_processor")
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    with torch.no_grad():
        states: Any = model(
            **resizing(images=images, return_tensors="pt"), output_hidden_states=True
        )
    return states.hidden_states[-2].flatten(0, 1)


def test_the_first_frame_or_both_ends_in_order(folder: Path, tmp_path: Path):
    pixels = clip()
    (first,) = encoded(make_run(folder, tmp_path, "first"), pixels)
    assert first.shape == (17, 16)
    assert torch.equal(first, hidden(folder, pixels[0]))
    (both,) = encoded(make_run(folder, tmp_path, "first", "last"), pixels)
    assert both.shape == (34, 16)
    assert torch.equal(both, hidden(folder, pixels[0], pixels[-1]))


def test_no_bit_depends_on_the_clips_beside_it(folder: Path, tmp_path: Path):
    run = make_run(folder, tmp_path, "first")
    one, two = encoded(run, clip(), clip().flip(0))
    assert torch.equal(one, encoded(run, clip())[0])
    assert not torch.equal(one, two)


def test_the_identity_follows_weights_and_frames(folder: Path, tmp_path: Path):
    identities = []
    for frames in (("first",), ("first", "last")):
        (encoder,) = Clip().encoders(make_run(folder, tmp_path, *frames))
        identities.append(encoder.identity())
    assert identities[0]["files"] == identities[1]["files"]
    assert identities[0] != identities[1]
    assert "model.safetensors" in identities[0]["files"]


def test_without_need_of_it_there_is_no_encoder_and_it_is_said(folder: Path, tmp_path: Path):
    run = make_run(folder, tmp_path)
    assert Clip().encoders(run) == []
    assert run.said == ["clip has no effect: model takes no image embeddings"]  # type: ignore[attr-defined]


def test_its_own_key_comes_first(folder: Path, tmp_path: Path):
    found = locate(str(folder), str(tmp_path))
    assert found.model == folder / "image_encoder"
    assert locate(None, str(folder)).model == folder / "image_encoder"
    assert described(None, str(folder)) == folder / "image_encoder"
    assert described(None, "owner/name") is None


def test_a_folder_without_one_is_refused_where_the_key_names_it(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no image_encoder/.*clip_pretrained_model_name"):
        locate(str(tmp_path), None)
    with pytest.raises(ModelError, match=r"the image encoder's folder \./nowhere does not exist"):
        locate("./nowhere", None)


def test_a_pickle_is_not_read(folder: Path, tmp_path: Path):
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "image_encoder" / "model.safetensors").rename(copy / "image_encoder" / "model.bin")
    with pytest.raises(ModelError, match="has no safetensors"):
        locate(str(copy), None).parts()
    with pytest.raises(OSError, match="safetensors"):
        load(copy / "image_encoder", copy / "image_processor", device=CPU)


def test_the_key_reaches_the_plugin(folder: Path, tmp_path: Path):
    run = make_run(tmp_path, tmp_path, "first")
    plugin = Clip(ClipSettings(clip_pretrained_model_name_or_path=str(folder)))
    (encoder,) = plugin.encoders(run)
    assert encoder.keep == "image_embeds"
    assert encoder.load().embed(clip()[:1]).shape == (17, 16)
