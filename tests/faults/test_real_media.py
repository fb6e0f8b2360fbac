"""Files as people have them: each is used, or skipped with the reason; none stops the run."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import media_files as media
from PIL import Image
from rich.console import Console
from toy_data import World

from trainer_core.data import Loader, render_report
from trainer_core.data.report import file_rows, printable

UPRIGHT = "48x80@9"
"""Bucket of a 64x96 picture; a 96x64 file that is turned when shown belongs there too."""


@dataclass(frozen=True)
class Case:
    """A file, and what becomes of it: its bucket (and a note), or why it is skipped.

    caption: None for the usual one; bytes as they stand in the text file; "" for no text file.
    """

    name: str
    make: Callable[[Path], Any] = media.write
    bucket: str = ""
    skipped: str = ""
    note: str = ""
    caption: bytes | str | None = None


def _uneven(count: int) -> list[int]:
    """When frames are shown whose gaps are 20 and 105 ms by turns: 16 a second on average."""
    return [n // 2 * 125 + n % 2 * 20 for n in range(count)]


def make(**keys: Any) -> Callable[[Path], Any]:
    return lambda path: media.write(path, **keys)


def bytes_of(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def still(path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(path, format="PNG")


def animation(path: Path) -> None:
    pictures = [Image.fromarray(picture) for picture in media.frames(20)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=60)


SQUARE = "64x64@9"
LATE = [5000 + 63 * n for n in range(20)]
HEVC = {"codec": "libx265", "pixels": "yuv420p10le", "options": {"x265-params": "log-level=none"}}
HUGE = b"many words " * 10_000
LONG = f"{'n' * 196}.mp4"
CASES = (
    Case("plain.mp4", bucket=SQUARE),
    Case("upright.mp4", make(size=(64, 96)), bucket=UPRIGHT),
    Case("turned-90.mp4", make(size=(96, 64), rotation=90), bucket=UPRIGHT),
    Case("turned-270.mov", make(size=(96, 64), rotation=270), bucket=UPRIGHT),
    Case("turned-180.mp4", make(size=(64, 96), rotation=180), bucket=UPRIGHT),
    Case("turned-90.mkv", make(size=(96, 64), rotation=90), bucket=UPRIGHT),
    Case("variable-rate.mp4", make(stamps_ms=_uneven(20)), bucket=SQUARE),
    Case("variable-rate.mkv", make(stamps_ms=_uneven(20)), bucket=SQUARE),
    Case("starts-late.mp4", make(stamps_ms=LATE), bucket=SQUARE),
    Case("starts-late.mkv", make(stamps_ms=LATE), bucket=SQUARE),
    Case("starts-late.ts", make(stamps_ms=LATE), bucket=SQUARE),
    Case("hevc-10-bit.mp4", make(**HEVC), bucket=SQUARE),
    Case("hevc-10-bit.mkv", make(**HEVC), bucket=SQUARE),
    Case("odd-size.mp4", make(size=(63, 65), pixels="yuv444p"), bucket=SQUARE),
    Case("odd-size.mkv", make(size=(65, 63), codec="ffv1"), bucket=SQUARE),
    Case("with-sound.mp4", make(audio=True), bucket=SQUARE),
    Case("vp9.webm", make(codec="libvpx-vp9"), bucket=SQUARE),
    Case("animation.gif", animation, bucket=SQUARE),
    Case("old.avi", make(codec="mpeg4"), bucket=SQUARE),
    Case("UPPER.MP4", make(form="mp4"), bucket=SQUARE),
    Case("webm-inside.mp4", make(codec="libvpx-vp9", form="webm"), bucket=SQUARE),
    Case("sound-only.mp4", media.write_sound_only, skipped="it has no picture"),
    Case("one-frame.mp4", make(count=1), skipped="1 frames, 9 are needed"),
    Case("cut.mp4", lambda path: media.cut_after(path, 58, total=120), bucket=SQUARE),
    Case(
        "cut-early.mp4", lambda path: media.cut_after(path, 5, total=120),
        skipped="5 frames, 9 are needed", note="header says 120 frames, 5 can be decoded",
    ),
    Case("no-pictures.mp4", media.spoil_pictures, skipped="no frame can be decoded"),
    Case("empty.mp4", bytes_of(b""), skipped="the file is empty"),
    Case("text.mp4", bytes_of(b"no video" * 99), skipped="cannot be read: "),
    Case("still-inside.mp4", still, skipped="1 frames, 9 are needed"),
    Case("still.png", still, skipped="image files are not taken by dataset_type video"),
    Case("Москва 東京 ñ 🎬.mp4", bucket=SQUARE),
    Case("two  spaces .mp4", bucket=SQUARE),
    Case("new\nline\ttab.mp4", bucket=SQUARE),
    Case("[markup] {x} %s \\.mp4", bucket=SQUARE),
    Case(LONG, bucket=SQUARE),
    Case("one-stem.mp4", bucket=SQUARE),
    Case("one-stem.webm", make(codec="libvpx-vp9"), bucket=SQUARE),
    Case("no-caption.mp4", caption="", skipped="its caption no-caption.txt is missing"),
    Case("empty-caption.mp4", caption=b" \n\t\n", skipped="empty-caption.txt is empty"),
    Case("latin.mp4", caption="grün".encode("latin-1"), skipped="latin.txt is not UTF-8"),
    Case("huge-caption.mp4", caption=HUGE, bucket=SQUARE),
    Case("marked-caption.mp4", caption=b"\xef\xbb\xbfwith a byte order mark", bucket=SQUARE),
)  # fmt: skip


def write_caption(path: Path, caption: bytes | str | None) -> None:
    beside = path.with_suffix(".txt")
    if isinstance(caption, bytes):
        beside.write_bytes(caption)
    elif caption is None:
        beside.write_text(f"a clip: {len(path.name)}", encoding="utf-8")


def build(root: Path) -> World:
    """Write all cases, and what is no file of its own: copies, links, loops."""
    world = World(root)
    world.keys["train_batch_size"] = 1
    folder = world.folder()
    for case in CASES:
        case.make(folder / case.name)
        write_caption(folder / case.name, case.caption)
    for name in ("copy.mp4", "deep/er/copy.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "plain.mp4", folder / name)
        write_caption(folder / name, None)
    (folder / "loop").symlink_to(folder)
    (folder / "deep" / "up").symlink_to("..")
    (folder / "itself.mp4").symlink_to("itself.mp4")
    (folder / "gone.mp4").symlink_to("nothing")
    (folder / "folder.mp4").mkdir()
    (folder / os.fsdecode(b"not-\xff-utf8.mp4")).write_bytes(b"x")
    world.add(video={"num_frames": 9})
    return world


EXTRA = {
    "copy.mp4": SQUARE,
    "deep/er/copy.mp4": SQUARE,
    "itself.mp4": "skipped: Too many levels of symbolic links",
    "gone.mp4": "skipped: No such file or directory",
    "not-\\udcff-utf8.mp4": "skipped: its name is not UTF-8; rename it",
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folder of all cases after a whole caching stage."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    world = build(tmp_path_factory.mktemp("media"))
    yield world, world.fill(pad=len(HUGE))
    torch.set_num_threads(before)


def outcomes(plan: Any) -> dict[str, tuple[str, str]]:
    """Return name → (bucket, note) of every row of the report."""
    return {row[0]: (row[2], row[-1]) for row in file_rows(plan, 0)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name)[:40])
def test_each_file_is_used_or_skipped_with_the_reason(cached, case):
    world, data = cached
    bucket, note = outcomes(data.plan)[case.name]
    assert bucket == case.bucket, note
    if case.skipped:
        assert note.startswith("skipped: ")
        assert case.skipped in note
    elif case.note:
        assert case.note in note
    assert not case.note or any(case.name in said and case.note in said for said in world.said)


def test_links_copies_and_odd_names_end_in_the_report_too(cached):
    _, data = cached
    found = outcomes(data.plan)
    assert {name: found[name][0] or found[name][1] for name in EXTRA} == EXTRA
    assert set(found) == {case.name for case in CASES} | set(EXTRA)


def test_the_report_shows_every_file_on_a_plain_and_on_a_real_terminal(cached):
    _, data = cached
    for terminal in (False, True):
        out = io.StringIO()
        render_report(data.plan, Console(file=out, width=3000, force_terminal=terminal))
        shown = "".join(out.getvalue().split())
        for name in outcomes(data.plan):
            assert "".join(printable(name).split()) in shown, name
    assert "new\\nline\\ttab.mp4" in shown


def test_every_used_file_is_encoded_and_loads(cached):
    world, data = cached
    used = [case.name for case in CASES if case.bucket] + ["copy.mp4", "deep/er/copy.mp4"]
    assert sorted(data.plan.files[s.file].name for s in data.plan.samples) == sorted(used)
    # equal bytes are one entry, however often they occur
    keys = {data.clip_key(data.of("pixels")[0], sample) for sample in data.plan.samples}
    sources = {(world.folder() / name).read_bytes() for name in used}
    assert len(keys) == len(sources) == data.encoded["toy.vae"] < len(used)
    for sample in data.plan.samples:
        latents = data.read_clip(sample)["latents"]
        crop = sample.crop
        assert latents.shape == (3, 9, crop.height // 16, crop.width // 16)
    loader = Loader(data, world.run(), start_step=0)
    try:
        seen = {next(iter(loader))[0].sample_ids for _ in range(loader.steps_per_epoch)}
    finally:
        loader.close()
    assert len(seen) == len(used)


def test_a_second_run_decodes_nothing_and_is_the_same(cached, monkeypatch):
    world, data = cached
    for stage in ("plan.probe", "fill.decode"):
        monkeypatch.setattr(f"trainer_core.data.{stage}", lambda *_, **__: pytest.fail("again"))
    again = world.fill(pad=len(HUGE))
    assert again.plan.digest == data.plan.digest
    assert set(again.encoded.values()) == {0}


def test_a_cut_file_gives_the_frames_that_decode(tmp_path):
    world = World(tmp_path)
    world.keys["train_batch_size"] = 1
    path = media.cut_after(world.folder() / "cut.mp4", 58, total=120)
    write_caption(path, None)
    world.add(video={"bucket_strategy": "resolution_frames", "max_frames": 200})
    assert outcomes(world.plan())["cut.mp4"][0] == "64x64@117"  # what the header promises
    data = world.fill()
    note = "header says 120 frames, 58 can be decoded"
    assert outcomes(data.plan)["cut.mp4"] == ("64x64@57", note)
    assert f"{path}: {note}" in world.said
    assert data.read_clip(data.plan.samples[0])["latents"].shape == (3, 57, 4, 4)


def test_turned_files_hold_the_picture_as_shown(tmp_path):
    """A file that stores a quarter turn and undoes it in its header shows the upright picture."""
    from trainer_core.data.decode import decode
    from trainer_core.data.probe import probe
    from trainer_core.data.types import CropPlan, FramePlan

    crop = CropPlan(64, 96, 0, 0, 64, 96)
    for ending in ("mp4", "mkv"):
        path = media.write(tmp_path / f"turned.{ending}", size=(96, 64), rotation=90)
        found = probe(path, "video")
        assert (found.width, found.height) == (64, 96)
        clip = decode(path, FramePlan(0, 9), crop, probe=found)  # (F, 3, H, W)
        wanted = torch.from_numpy(media.frames(9, size=(96, 64))).rot90(1, (1, 2))
        error = (clip.float() - wanted.permute(0, 3, 1, 2).float()).abs().mean()
        assert error < 12


def test_a_file_that_may_not_be_read_is_skipped_until_it_may(tmp_path):
    """The tests may run as root, who may read all: then another user runs this part."""
    world = World(tmp_path)
    world.keys["train_batch_size"] = 1
    folder = world.folder()
    for name in ("open.mp4", "shut.mp4"):
        write_caption(media.write(folder / name), None)
    world.add(video={"num_frames": 9})
    world.fill()  # everything that is imported late is there now
    media.write(folder / "shut.mp4", 21)
    (folder / "shut.mp4").chmod(0)
    with another_user(tmp_path):
        shut = [f for f in world.plan().files if f.skipped]
    assert [(f.name, f.skipped) for f in shut] == [
        ("shut.mp4", "cannot be read: Permission denied")
    ]
    (folder / "shut.mp4").chmod(0o644)
    assert not [f for f in world.plan().files if f.skipped]


class another_user:
    """Lets a block run as a user without privileges who owns a folder, when root runs the tests."""

    NOBODY = 65534

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, os.geteuid() == 0

    def __enter__(self) -> None:
        if not self.root:
            return
        for place in [self.folder, *self.folder.rglob("*")]:
            os.chown(place, self.NOBODY, self.NOBODY, follow_symlinks=False)
        # the folders above belong to root and are closed to others, so work from inside
        self.parents = [(p, p.stat().st_mode) for p in self.folder.parents if p != Path("/")]
        for place, mode in self.parents:
            place.chmod(mode | 0o011)
        os.seteuid(self.NOBODY)

    def __exit__(self, *_: object) -> None:
        if self.root:
            os.seteuid(0)
            for place, mode in self.parents:
                place.chmod(mode)
