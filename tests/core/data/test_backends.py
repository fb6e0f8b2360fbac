from __future__ import annotations

import json

import pytest

from trainer_core.data import load_backends
from trainer_core.errors import ConfigError

PAGE = """[
  {"id": "disney-black-and-white", "type": "local", "dataset_type": "video", "crop": false,
   "resolution": 480, "minimum_image_size": 480, "maximum_image_size": 480,
   "target_downsample_size": 480, "resolution_type": "pixel_area",
   "cache_dir_vae": "cache/vae/wan/disney-black-and-white",
   "instance_data_dir": "datasets/disney-black-and-white", "disabled": false,
   "caption_strategy": "textfile", "metadata_backend": "discovery", "repeats": 0,
   "video": {"num_frames": 75, "min_frames": 75, "bucket_strategy": "aspect_ratio"}},
  {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true,
   "cache_dir": "cache/text/wan", "disabled": false, "write_batch_size": 128},
]"""


def problems(world) -> str:
    with pytest.raises(ConfigError) as caught:
        world.backends()
    return str(caught.value)


def test_the_quick_starts_file_is_read_as_it_is(world, monkeypatch):
    monkeypatch.chdir(world.root)
    path = world.root / "config" / "data.json"
    path.parent.mkdir()
    path.write_text(PAGE, encoding="utf-8")  # with its trailing comma
    (world.root / "datasets" / "disney-black-and-white").mkdir(parents=True)
    backends = load_backends(path, world.settings)
    (dataset,) = backends.datasets
    assert (dataset.num_frames, dataset.min_frames, dataset.repeats) == (75, 75, 0)
    assert dataset.folder.is_absolute()
    assert str(dataset.cache_dir) == "cache/vae/wan/disney-black-and-white"
    assert str(backends.text_cache) == "cache/text/wan"
    assert backends.write_batch_size == 128
    assert "no effect with crop: false" in backends.notes[0]


def test_a_folder_is_sought_in_the_working_directory_then_beside_the_file(world, monkeypatch):
    world.add("a", instance_data_dir="media")
    (world.root / "media").mkdir()
    elsewhere = world.root / "elsewhere"
    (elsewhere / "media").mkdir(parents=True)
    monkeypatch.chdir(world.root / "a")
    assert world.backends().datasets[0].folder == world.root / "media"
    monkeypatch.chdir(elsewhere)
    assert world.backends().datasets[0].folder == elsewhere / "media"


def test_all_problems_of_a_file_at_once(world):
    world.add("a", resolutoin=3, num_frames=9, caption_strategy="instanceprompt")
    world.add("b", instance_data_dir="nowhere", video={"num_frames": 81, "min_frames": 49})
    world.add("c", type="aws")
    world.add("d", kind="image_embeds")
    world.add("e", kind="vidoe")
    world.add("f", crop_aspect="square", video={"frame_interval": 8}, repeats=-1)
    world.add("g", maximum_image_size=900, instance_data_dir="s3://bucket/x")
    world.add("off", disabled="true", nonsense=1)
    text = problems(world)
    for part in (
        "Did you mean 'resolution'?", "Move it into the object video", "there is no nowhere",
        "at least num_frames (81)", "entry 'c': type = 'aws': not built yet",
        "entry 'd': dataset_type", "Did you mean 'video'?", "entry 'f': repeats",
        "s3 is not read", "needs target_downsample_size",
    ):  # fmt: skip
        assert part in text, part
    assert "nonsense" not in text
    assert str(world.root / "data.json") in text


def test_instance_prompt_and_crop_keys_are_checked(world):
    world.add("a", caption_strategy="instanceprompt")
    world.add("b", crop_style="centre", video={"frame_interval": 8, "max_frames": 5})
    world.add("c", kind="image", video={"num_frames": 5})
    text = problems(world)
    assert "caption_strategy instanceprompt needs it" in text
    assert "crop_style = 'center': has no effect with crop: false" in text
    assert "works with bucket_strategy resolution_frames only" in text
    assert "has no effect on images" in text


def test_two_default_text_caches_and_double_ids(world):
    world.add("a")
    world.add("a")
    world.entries += [{"id": f"t{n}", "dataset_type": "text_embeds"} for n in (1, 2)]
    text = problems(world)
    assert "two enabled entries have this id" in text
    assert "'t1' and 't2' compete" in text


def test_overrides_win_over_the_file(world):
    world.add("a", repeats=1)
    world.add("a.b")
    found = world.backends(
        {"repeats": 3, "a.b.repeats": 5, "a.b.video.num_frames": 9,
         "instance_data_dir": str(world.folder("other"))}
    )  # fmt: skip
    assert [d.repeats for d in found.datasets] == [3, 5]
    assert found.datasets[1].num_frames == 9
    assert {d.folder.name for d in found.datasets} == {"other"}


def test_broken_files(world):
    world.add("a")
    path = world.root / "broken.json"
    for text in ("[{", json.dumps({"id": 1}), "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError):
            load_backends(path, world.settings)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_backends(world.root / "absent.json", world.settings)


def test_only_held_out_data_is_refused(world):
    world.add("a", kind="eval")
    assert "no enabled entry of type video or image" in problems(world)
