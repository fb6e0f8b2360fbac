"""One clip on its own, and where image embeddings are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer_core.data import load_backends
from trainer_core.data.single import encode_clip, example
from trainer_core.errors import ConfigError
from trainer_core.media import read_frames
from trainer_core.settings.core import CoreSettings
from trainer_core.testing.clips import write_clips
from trainer_core.types import EncodedTensor


@pytest.fixture
def filled(world):
    write_clips(world.folder(), n=2, sizes=[(64, 64)], frames=20, fps=16)
    world.add(video={"num_frames": 17})
    return world


def first_frames(world, name: str, frames: int) -> torch.Tensor:
    pixels = read_frames(sorted(world.folder(name).glob("*.mp4"))[0])[:frames]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_a_clip_is_encoded_as_the_cache_would_hold_it_and_nothing_is_written(filled):
    data = filled.fill()
    before = sorted((filled.root / "cache").rglob("*"))
    clip = first_frames(filled, "clips", 17)
    found = encode_clip(data, clip, ("latents", "text"))
    assert list(found) == ["latents"], "text is made of captions"
    assert torch.allclose(found["latents"], data.read_clip(data.plan.samples[0])["latents"])
    assert sorted((filled.root / "cache").rglob("*")) == before
    assert encode_clip(data, clip, ()) == {}


def test_an_example_is_held_out_where_anything_is(filled):
    assert torch.equal(example(filled.fill()), first_frames(filled, "clips", 17))
    write_clips(filled.folder("aside"), n=1, seed=9, sizes=[(64, 64)], frames=20, fps=16)
    filled.add("aside", kind="eval", instance_data_dir="aside", video={"num_frames": 9})
    assert torch.equal(example(filled.fill()), first_frames(filled, "aside", 9))


def embeds_entry(**keys: Any) -> dict[str, Any]:
    return {"id": "shared", "type": "local", "dataset_type": "conditioning_image_embeds", **keys}


def places(world) -> list[str]:
    import json

    file = world.root / "data.json"
    file.write_text(json.dumps(world.entries))
    backends = load_backends(file, CoreSettings(cache_dir="cache"))
    return [str(dataset.embeds_dir) for dataset in backends.datasets]


def test_image_embeddings_lie_where_the_dataset_or_the_entry_it_names_says(world):
    for name in ("a", "b", "c", "d"):
        world.folder(name)
        world.add(name, instance_data_dir=name)
    world.entries[1]["conditioning_image_embeds"] = "shared"
    world.entries[2]["conditioning_image_embeds"] = "shared"
    world.entries[3] |= {
        "conditioning_image_embeds": "shared",
        "cache_dir_conditioning_image_embeds": "own/{id}",
    }
    world.entries.append(embeds_entry())
    default = "cache/conditioning_image_embeds"
    assert places(world) == [f"{default}/a", f"{default}/shared", f"{default}/shared", "own/d"]
    world.entries[-1]["cache_dir"] = "elsewhere"
    assert places(world) == [f"{default}/a", "elsewhere", "elsewhere", "own/d"]
    world.entries[-1]["disabled"] = True
    with pytest.raises(
        ConfigError, match=r"conditioning_image_embeds = 'shared': names no enabled"
    ):
        places(world)


def test_is_i2v_is_refused_with_the_reason(world):
    world.folder("a")
    world.add("a", instance_data_dir="a", video={"is_i2v": True})
    with pytest.raises(ConfigError, match=r"is_i2v = True: is no choice of a dataset"):
        places(world)


def test_encoders_of_image_embeddings_keep_theirs_apart(filled):
    latents, text = filled.encoders()
    embeds = replace(
        latents, name="toy.image", writes=(EncodedTensor("image"),), keep="image_embeds",
        load=lambda: "network of toy.image",
    )  # fmt: skip
    filled.hooks.spoil = lambda tensors: tensors
    answer = filled.hooks.encode_batch

    def encode_batch(*, run, encoder, samples):
        found = answer(run=run, encoder=encoder, samples=samples)
        if encoder.name == "toy.image":
            return [{"image": result["latents"][:, :1]} for result in found]
        return found

    filled.hooks.encode_batch = encode_batch
    from trainer_core.data import fill_cache

    plan = filled.plan()
    data = fill_cache(plan, filled.run(), (latents, embeds, text), filled.hooks)
    kept = filled.root / "cache" / "conditioning_image_embeds" / "clips"
    assert len([path for path in kept.rglob("*") if path.is_file()]) == 2
    assert set(data.read_clip(plan.samples[0])) == {"latents", "image"}
