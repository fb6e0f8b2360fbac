from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from trainer_core.data import render_report
from trainer_core.data.report import notes, printable, warnings
from trainer_core.errors import DataError
from trainer_core.testing.clips import write_clips


def clips(world, name="clips", **keys):
    keys = {"n": 4, "sizes": [(64, 64)], "frames": 20, "fps": 16} | keys
    return write_clips(world.folder(name), **keys)


def skipped(plan) -> dict[str, str]:
    return {file.name: file.skipped for file in plan.files if file.skipped}


def report(plan) -> str:
    out = io.StringIO()
    render_report(plan, Console(file=out, width=80))
    return out.getvalue()


def test_every_file_is_used_or_skipped_with_the_reason(world):
    paths = clips(world, n=9)
    folder = world.folder()
    paths[0].write_bytes(b"")
    paths[1].with_suffix(".txt").unlink()
    paths[2].with_suffix(".txt").write_text(" \n\n")
    paths[3].with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    write_clips(folder / "short ünd\nodd", n=1, sizes=[(64, 64)], frames=5, fps=16)
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.mp4").symlink_to(folder / "nothing")
    (folder / ".hidden.mp4").write_bytes(b"x")
    (folder / "readme.md").write_text("not media")
    world.add(video={"num_frames": 17})
    plan = world.plan()
    assert skipped(plan) == {
        "clip_000.mp4": "the file is empty",
        "clip_001.mp4": "its caption clip_001.txt is missing",
        "clip_002.mp4": "its caption clip_002.txt is empty",
        "clip_003.mp4": "its caption clip_003.txt is not UTF-8",
        "gone.mp4": "No such file or directory",
        "short ünd\nodd/clip_000.mp4": "5 frames, 17 are needed",
        "still.png": "image files are not taken by dataset_type video",
    }
    assert [plan.sample_id(s) for s in plan.samples] == [
        f"clips/clip_00{n}.mp4" for n in (4, 5, 6, 7, 8)
    ]
    text = report(plan)
    for file in plan.files:
        assert printable(file.name) in text
        assert file.skipped in text


def test_a_second_plan_reads_nothing_and_is_the_same(world, monkeypatch):
    clips(world)
    world.add(video={"num_frames": 17, "frame_selection": "random"}, repeats=2)
    first = world.plan()
    monkeypatch.setattr("trainer_core.data.plan.probe", lambda *_: pytest.fail("probed again"))
    assert world.plan().digest == first.digest


def test_the_digest_changes_with_samples_and_plans(world):
    paths = clips(world)
    world.add(video={"num_frames": 17})
    digests = {world.plan().digest}
    world.entries[0]["video"]["num_frames"] = 13
    digests.add(world.plan().digest)
    paths[0].with_suffix(".txt").write_text("other words")
    digests.add(world.plan().digest)
    paths[1].unlink()
    digests.add(world.plan().digest)
    world.entries[0]["repeats"] = 1
    digests.add(world.plan().digest)
    assert len(digests) == 5


def test_random_positions_are_one_draw_per_pass_and_fixed(world):
    clips(world, frames=60)
    world.add(video={"num_frames": 17, "frame_selection": "random"}, repeats=3)
    first = world.plan()
    places = {s.frames.start for s in first.samples}
    assert len(places) > 4
    assert sum(s.uses for s in first.samples) == 16
    assert [s.frames for s in world.plan().samples] == [s.frames for s in first.samples]
    world.keys["seed"] = 7
    assert {s.frames.start for s in world.plan().samples} != places


def test_random_crops_differ_by_pass_and_stay_inside(world):
    clips(world, sizes=[(128, 64)])
    world.add(crop=True, resolution=48, repeats=3, video={"num_frames": 17})
    plan = world.plan()
    lefts = {sample.crop.left for sample in plan.samples}
    assert len(lefts) > 4
    assert all(0 <= s.crop.left <= s.crop.resize_w - s.crop.width for s in plan.samples)
    assert sum(s.uses for s in plan.samples) == 16


def test_chunks_are_samples_of_their_own(world):
    clips(world, n=1, frames=60)
    world.add(video={"num_frames": 17, "frame_selection": "chunk"})
    plan = world.plan()
    assert [plan.sample_id(s) for s in plan.samples] == [
        "clips/clip_000.mp4", "clips/clip_000.mp4#17", "clips/clip_000.mp4#34"
    ]  # fmt: skip


def test_a_bucket_below_a_step_is_left_out_and_named(world):
    clips(world, n=4)
    write_clips(world.folder() / "wide", n=1, sizes=[(128, 64)], frames=20, fps=16)
    world.add(video={"num_frames": 17})
    world.keys["gradient_accumulation_steps"] = 2
    plan = world.plan()
    assert len(plan.buckets) == 1
    ((bucket, why),) = plan.dropped
    assert "1 samples counted with repeats, 4 are needed" in why
    assert "repeats 3 is enough" in why
    assert any(bucket.name in text for text in warnings(plan))
    assert "left out: 1 samples" in report(plan)
    world.entries[0]["repeats"] = 3
    assert not world.plan().dropped
    world.entries[0]["repeats"] = 0
    world.keys["disable_bucket_pruning"] = True
    assert len(world.plan().buckets) == 2


def test_nothing_left_names_the_dataset_and_the_cure(world):
    clips(world, n=1)
    world.add(video={"num_frames": 17})
    with pytest.raises(DataError, match="no samples detected in dataset clips") as caught:
        world.plan()
    assert "repeats 1 is enough" in str(caught.value)
    world.entries[0]["repeats"] = 1
    world.plan()
    world.add("empty")
    with pytest.raises(DataError, match=r"dataset empty(.|\n)*holds no video files"):
        world.plan()


def test_processes_count(world):
    clips(world, n=4)
    world.add(video={"num_frames": 17})
    assert world.plan(world_size=2).buckets
    with pytest.raises(DataError, match="x 3 processes"):
        world.plan(world_size=3)


def test_images_are_clips_of_one_frame_beside_video(world):
    clips(world)
    for number in range(2):
        path = world.folder("stills") / f"a_red_cat_{number}.png"
        Image.new("RGB", (96, 64)).save(path)
    world.add(video={"num_frames": 17})
    world.add("stills", kind="image", caption_strategy="filename")
    plan = world.plan()
    assert {(plan.datasets[b.dataset].id, b.frames) for b in plan.buckets} == {
        ("clips", 17), ("stills", 1)
    }  # fmt: skip
    assert plan.files[-1].captions == ("a red cat 1",)


def test_captions_from_tables_and_lines(world):
    paths = clips(world, n=2)
    paths[0].with_suffix(".txt").write_text("one\n\n two \n", encoding="utf-8-sig")
    world.add(video={"num_frames": 17})
    assert world.plan().files[0].captions == ("one", "two")
    rows = [{"file_name": p.name, "text": [f"row {p.name}", "other"]} for p in paths]
    (world.folder() / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    world.entries[0] |= {"caption_strategy": "jsonl", "caption_column": "text"}
    assert world.plan().files[0].captions == ("row clip_000.mp4", "other")
    world.entries[0] |= {"caption_column": "txt"}
    with pytest.raises(DataError, match="has the columns file_name, text"):
        world.plan()
    (world.root / "c.csv").write_text('file_name,caption\nclip_000.mp4,"a, b"\nclip_001.mp4,c\n')
    world.entries[0] |= {
        "caption_strategy": "csv", "caption_column": "caption",
        "caption_file": str(world.root / "c.csv"),
    }  # fmt: skip
    assert [f.captions for f in world.plan().files] == [("a, b",), ("c",)]


def test_the_report_warns_where_it_should(world):
    clips(world, fps=12)
    world.add(video={"num_frames": 19, "framerate": 16}, resolution=96)
    world.keys["train_batch_size"] = 3
    plan = world.plan(replace(world.spec, sizes=((832, 480),)))
    text = " / ".join([*warnings(plan), *notes(plan)])
    assert "not a size the model was trained at" in text
    assert "4 files are slower than 16 fps" in text
    assert "4 files are smaller than their bucket" in text
    assert "num_frames 19 -> 17 frames" in text
    assert "the last batch is filled with 2 samples" in text
    assert "slower source, keeps its frames" in report(plan)
    world.entries[0]["video"]["framerate"] = "source"
    assert "slower" not in report(world.plan())


def test_a_terminal_of_80_columns_shows_names_whole(world):
    clips(world)
    world.add(video={"num_frames": 17})
    shown = {}
    for width in (80, 140):
        out = io.StringIO()
        render_report(world.plan(), Console(file=out, width=width, force_terminal=True))
        shown[width] = out.getvalue()
    for text in shown.values():
        assert all(f"clip_00{n}.mp4" in text and f"{n}" in text for n in range(4))
        assert all(column in text for column in ("file", "bucket", "span", "tokens", "note"))
    assert "20 frames at 16 fps" in shown[140]
    assert "source" not in shown[80]
