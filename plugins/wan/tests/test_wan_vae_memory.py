"""Tiles, slices, and the model put aside while samples are decoded."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_core.run import MODEL_ASIDE, State
from trainer_core.types import Placement, Prompt
from trainer_wan import Wan, vae
from trainer_wan.config import WanSettings
from trainer_wan.testing import write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae") / "wan", layers=1)


def clips(number: int, edge: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 256, (1, 3, edge, edge), generator=draw, dtype=torch.uint8)
        for _ in range(number)
    ]


def small_tiles(network: Any) -> Any:
    """Tiles of 32 pixels every 24, in place of 256 and 192."""
    network.tile_sample_min_height = network.tile_sample_min_width = 32
    network.tile_sample_stride_height = network.tile_sample_stride_width = 24
    return network


def test_tiles_give_nearly_the_whole_clips_latents_and_pixels(checkpoint: Path):
    whole = vae.load(checkpoint / "vae", device=CPU)
    tiled = small_tiles(vae.load(checkpoint / "vae", device=CPU, tiling=True))
    (plain,), (pieces,) = (vae.encode(network, clips(1, 64)) for network in (whole, tiled))
    assert pieces.shape == plain.shape
    assert not torch.equal(pieces, plain), "it went through in tiles"
    both = torch.stack([pieces.flatten(), plain.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.5
    seen = [vae.decode(network, plain).float() for network in (whole, tiled)]
    assert seen[1].shape == seen[0].shape
    assert not torch.equal(*seen)
    assert float((seen[1] - seen[0]).abs().mean()) < 16


def test_a_clip_that_is_one_tile_comes_out_the_same(checkpoint: Path):
    networks = [vae.load(checkpoint / "vae", device=CPU, tiling=on) for on in (False, True)]
    one, two = (vae.encode(network, clips(1, 64))[0] for network in networks)
    assert torch.equal(one, two)


def test_slices_are_the_clips_one_by_one(checkpoint: Path):
    network = vae.load(checkpoint / "vae", device=CPU, slicing=True)
    plain = vae.load(checkpoint / "vae", device=CPU)
    wanted = [vae.encode(plain, [clip])[0] for clip in clips(3, 32)]
    assert all(
        torch.equal(a, b) for a, b in zip(vae.encode(network, clips(3, 32)), wanted, strict=True)
    )


def run_of(checkpoint: Path, **keys: Any) -> Any:
    settings = {"model_flavour": None, "pretrained_model_name_or_path": str(checkpoint)}
    settings |= {"vae_batch_size": 1, "write_batch_size": 1, "model_type": "lora", **keys}
    said: list[str] = []
    return SimpleNamespace(
        settings=SimpleNamespace(**settings), device=CPU, state=State(), said=said, say=said.append,
        file_digest=lambda path: path.name, placement=Placement(CPU, torch.float32, torch.float32),
    )  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"vae_enable_tiling": True}, {"vae_enable_slicing": True}])
def test_the_keys_reach_the_encoder_and_tiling_its_identity(
    checkpoint: Path, keys: dict[str, bool]
):
    run, plugin = run_of(checkpoint), Wan(WanSettings(**keys))
    (encoder,) = plugin.encoders(run)
    network = encoder.load()
    assert network.use_tiling == keys.get("vae_enable_tiling", False)
    assert network.use_slicing == keys.get("vae_enable_slicing", False)
    (plain,) = Wan(WanSettings()).encoders(run)
    assert (encoder.identity() != plain.identity()) == keys.get("vae_enable_tiling", False)


def test_slicing_single_clips_is_told_to_have_no_effect(make_run):
    run = make_run()
    Wan(WanSettings(vae_enable_slicing=True)).check(run)
    assert run.said == [
        "vae_enable_slicing has no effect: it acts with vae_batch_size above 1 only"
    ]


def test_decoding_happens_with_the_model_aside(make_run, monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []

    @contextmanager
    def aside():
        log.append("aside")
        yield
        log.append("back")

    plugin, run = Wan(WanSettings(vae_enable_tiling=True)), make_run(
        validation_num_inference_steps=1, validation_num_video_frames=5,
        validation_resolution="32x32", validation_guidance=1.0,
    )  # fmt: skip
    run.spec = plugin.describe_model(run)
    run.model = plugin.load_model(run)
    run.state[MODEL_ASIDE] = aside
    run.prompts = (Prompt("a", "a"),)
    run.set_captions(lambda _: {"text_embeds": torch.zeros(4, 32)})

    def sampled(*_: Any, **__: Any) -> list[torch.Tensor]:
        log.append("sample")
        return [torch.zeros(16, 1, 4, 4)]

    def decoded(network: Any, latents: torch.Tensor) -> torch.Tensor:
        assert network.use_tiling
        log.append("decode")
        return torch.zeros(1, 32, 32, 3, dtype=torch.uint8)

    monkeypatch.setattr("trainer_wan.validation.sample_latents", sampled)
    monkeypatch.setattr(vae, "decode", decoded)
    plugin.validate(run)
    assert log == ["sample", "aside", "decode", "back"]
