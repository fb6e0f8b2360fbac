"""What a step is made of: captions, images, random state, and nothing that waits for the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer_core import PluginInfo, hookimpl, loop, rng
from trainer_core.catalogue import Catalogue
from trainer_core.data import Loader
from trainer_core.flow import Flow
from trainer_core.optim import Optimizers
from trainer_core.plugins import build
from trainer_core.session import run
from trainer_core.settings.load import resolve
from trainer_core.testing.harness import CORE, train, write_world
from trainer_core.testing.tiny import TEXT_LENGTH, Tiny, embedding_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


class Watching:
    """Keeps what the model is given."""

    info = PluginInfo(summary="keeps what the model is given")

    def __init__(self, settings: Any = None) -> None:
        self.texts: list[torch.Tensor] = []
        self.shapes: list[tuple[int, ...]] = []

    @hookimpl
    def prepare_inputs(self, inputs):
        self.texts += list(inputs.conditioning["text_embeds"])
        self.shapes.append(tuple(inputs.x_t.shape))
        return inputs


def test_captions_are_dropped_for_the_share_that_is_set_sample_by_sample(folder: Path):
    keys = {
        "train_batch_size": 4,
        "max_train_steps": 40,
        "log_step_interval": 40,
        "checkpoint_step_interval": 0,
    }

    def captions(share: float) -> list[str]:
        more = {"caption_dropout_probability": share}
        output = f"dropout-{share}"
        done = train(folder, plugins={"w": Watching}, settings=keys | more, output=output)
        found = [caption for draw in done.draws for caption in draw.captions]
        nothing = torch.zeros(TEXT_LENGTH, embedding_of("").shape[1])
        nothing[:1] = embedding_of("")
        given = [bool(torch.equal(text, nothing)) for text in done.plugin("w").texts]
        assert given == [caption == "" for caption in found], "the empty caption's embedding"
        return found

    found = captions(0.3)
    dropped = [caption == "" for caption in found]
    # 160 draws: a standard deviation of the share is 0.036
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.1)
    batches = [sum(dropped[at : at + 4]) for at in range(0, len(dropped), 4)]
    assert set(batches) >= {0, 1, 2}, "one draw a sample, not one a batch"
    keys["max_train_steps"] = 2
    assert set(captions(1.0)) == {""}
    assert "" not in captions(0.0)


def test_images_train_as_clips_of_one_frame(folder: Path):
    stills = folder / "stills"
    stills.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 10, 20)).save(stills / f"{number}.png")
        (stills / f"{number}.txt").write_text(f"shade {number}")
    entry = {
        "id": "stills", "type": "local", "dataset_type": "image",
        "instance_data_dir": str(stills), "caption_strategy": "textfile",
    }  # fmt: skip
    clips = json.loads(write_world(folder).read_text())
    alone, mixed = folder / "data-alone.json", folder / "data-mixed.json"
    alone.write_text(json.dumps([entry]))
    mixed.write_text(json.dumps([entry, *clips]))

    def shapes(file: Path) -> set[tuple[int, ...]]:
        keys = {"data_backend_config": str(file), "max_train_steps": 8}
        done = train(folder, plugins={"w": Watching}, settings=keys, output=f"run-{file.stem}")
        assert len(done.steps) == 8
        assert done.weights()
        return set(done.plugin("w").shapes)

    assert shapes(alone) == {(2, 4, 1, 4, 4)}
    assert shapes(mixed) == {(2, 4, 1, 4, 4), (2, 4, 2, 4, 4)}


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_global_generators_get_the_state_that_torch_itself_gives(name: str):
    device = torch.device(name)
    with torch.random.fork_rng(devices=[0] if name == "cuda" else []):
        torch.manual_seed(rng.seed_of(3, "global", 5, 1, 0))
        wanted = [torch.rand(3), torch.rand(3, device=device)]
        torch.manual_seed(0)
        rng.seed_global(3, 5, 1, 0, device=device)
        found = [torch.rand(3), torch.rand(3, device=device)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_in_a_step_waits_for_the_device(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Reading a batch onto the device and a whole step, with torch's own alarm switched on."""
    ran: list[str] = []

    def alarmed(function: Any) -> Any:
        def call(*words: Any) -> Any:
            ran.append(function.__name__)
            if name == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*words)
            finally:
                if name == "cuda":
                    torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(loop, "train_step", alarmed(loop.train_step))
    monkeypatch.setattr(Loader, "_placed", alarmed(Loader._placed))
    config = {
        **CORE,
        "device": name,
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
        "data_backend_config": str(write_world(folder)),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / f"on-{name}"),
        "plugins": ["tiny"],
        "use_ema": True,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    catalogue = Catalogue.of({"tiny": Tiny})
    resolved = resolve(file, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    with torch.random.fork_rng(devices=[0] if name == "cuda" else []):
        assert run(resolved, host) == 0
    assert ran.count("train_step") == 3
    assert ran.count("_placed") >= 6
