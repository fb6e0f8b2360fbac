"""delete_problematic_images: only what cannot be read in two runs, never without a trace."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from faults import media_files as media
from toy_data import World

from trainer_core.files import digest_file

BROKEN = {
    "empty.mp4": "the file is empty",
    "text.mp4": "cannot be read: Invalid data found when processing input",
    "no-pictures.mp4": "no frame can be decoded",
}


@pytest.fixture
def broken(tmp_path: Path) -> World:
    """Two good clips, three that cannot be read, and some that are unusable by settings."""
    world = World(tmp_path)
    world.keys |= {"delete_problematic_images": True, "train_batch_size": 1}
    folder = world.folder()
    media.write(folder / "good.mp4")
    media.write(folder / "short.mp4", 5)
    media.write(folder / "no-caption.mp4", 21)
    media.write_sound_only(folder / "sound.mp4")
    (folder / "still.png").write_bytes(b"no picture")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"no video" * 99)
    media.spoil_pictures(folder / "no-pictures.mp4")
    for path in sorted(folder.glob("*.mp4")):
        if path.stem != "no-caption":
            path.with_suffix(".txt").write_text("a clip")
    world.add(video={"num_frames": 9})
    return world


def names(world: World) -> set[str]:
    return {path.name for path in world.folder().iterdir() if path.suffix != ".txt"}


def log_of(world: World) -> list[dict[str, str]]:
    path = Path(world.keys["cache_dir"]) / "deleted.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_files_go_in_the_second_run_and_the_log_tells(broken):
    before = names(broken)
    digests = {name: digest_file(broken.folder() / name) for name in BROKEN}
    broken.fill()
    assert names(broken) == before
    assert log_of(broken) == []
    for name, why in BROKEN.items():
        line = f"{broken.folder() / name}: {why}; it is deleted if it fails again in another run"
        assert broken.said.count(line) == 1
    data = broken.fill()
    assert names(broken) == before - set(BROKEN)
    found = {Path(line["path"]).name: line for line in log_of(broken)}
    assert set(found) == set(BROKEN)
    for name, line in found.items():
        assert line["reason"] == BROKEN[name]
        assert line["digest"] == digests[name]
        assert line["time"].endswith("+00:00")
    skipped = {file.name: file.skipped for file in data.plan.files}
    assert skipped["empty.mp4"] == "the file is empty; deleted"
    broken.fill()
    assert len(log_of(broken)) == len(BROKEN)


def test_nothing_is_deleted_by_default(broken):
    before = names(broken)
    del broken.keys["delete_problematic_images"]
    for _ in range(3):
        broken.fill()
    assert names(broken) == before


def test_a_plan_alone_deletes_nothing(broken):
    before = names(broken)
    broken.fill()
    for _ in range(3):
        broken.plan()
    assert names(broken) == before


def test_a_file_that_changed_or_was_repaired_is_looked_at_anew(broken):
    broken.fill()
    folder = broken.folder()
    media.write(folder / "empty.mp4", 22)
    (folder / "text.mp4").write_bytes(b"no film" * 99)
    broken.fill()
    assert {"empty.mp4", "text.mp4"} <= names(broken)
    assert {Path(line["path"]).name for line in log_of(broken)} == {"no-pictures.mp4"}
    used = {broken.plan().files[s.file].name for s in broken.plan().samples}
    assert used == {"good.mp4", "empty.mp4"}


def test_a_file_that_can_be_read_after_all_is_used_again(broken):
    """The same bytes, size and time: only the remembered verdict was wrong."""
    from trainer_core.data.store import Store

    plan = broken.plan()
    good = next(file for file in plan.files if file.name == "no-caption.mp4")
    (broken.folder() / "no-caption.txt").write_text("a clip")
    with Store(plan.backends.index) as store:
        store.remember_probe(plan.stamp_of(good), "cannot be read: a passing fault")
        store.remember_failure(plan.stamp_of(good), 2)
    broken.fill()
    assert "no-caption.mp4" in names(broken)
    used = {broken.plan().files[s.file].name for s in broken.plan().samples}
    assert "no-caption.mp4" in used


def test_nothing_outside_of_the_folder_is_touched(broken):
    elsewhere = broken.root / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    targets = [elsewhere / "far.mp4", elsewhere / "inner" / "deep.mp4"]
    for target in targets:
        target.write_bytes(b"")
    (broken.folder() / "far.mp4").symlink_to(targets[0])
    (broken.folder() / "linked").symlink_to(elsewhere / "inner")
    for _ in range(3):
        broken.fill()
    assert all(target.exists() for target in targets)
    assert (broken.folder() / "far.mp4").is_symlink()
    assert sum("outside of the dataset's folder" in said for said in broken.said) == 4
    assert {Path(line["path"]).name for line in log_of(broken)} == set(BROKEN)


def test_a_disk_that_fails_is_no_reason_to_delete(broken, monkeypatch):
    """Errors of the system, of which a test cannot order a real one, are not the file's fault."""
    broken.fill()
    before = names(broken)
    real = os.stat

    def failing(path, *words, **more):
        if str(path).endswith("text.mp4"):
            raise OSError(5, "Input/output error")
        return real(path, *words, **more)

    plan = broken.plan()
    monkeypatch.setattr("os.stat", failing)
    broken.fill(plan=plan)
    monkeypatch.undo()
    assert names(broken) == before - {"empty.mp4", "no-pictures.mp4"}
