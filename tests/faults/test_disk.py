"""A full disk, a read-only one: the run ends with the way out, and goes on to the same bits."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import ConfigError, DataError, TrainerError, files, hookimpl
from trainer_core.data import store
from trainer_core.data.store import Store
from trainer_core.errors import CheckpointError
from trainer_core.testing.harness import Finished, attempt, train
from trainer_core.testing.tiny import Tiny

SIZE_BYTES = 8 << 20
SAMPLES = {"validation_prompt": "a red circle", "validation_step_interval": 2, "use_ema": True}
MOUNT = 'mount -t tmpfs -o size=$1 tmpfs "$2"'
HOLDER = MOUNT + " && echo ready && while read line; do $line; echo $?; done"


@dataclass
class Disk:
    """A small file system: mounted by root, or by anyone in a mount namespace that ends with its shell.

    root: where it is seen from here. sqlite does not follow the way into a namespace.
    """

    point: Path
    shell: subprocess.Popen[str] | None = None

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.shell.pid}/root{self.point}") if self.shell else self.point

    def order(self, command: str) -> None:
        """Run a command where the disk is mounted; POINT stands for its folder."""
        command = command.replace("POINT", str(self.point))
        if self.shell is None:
            subprocess.run(command.split(), check=True)
            return
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"{command}\n")
        self.shell.stdin.flush()
        assert self.shell.stdout.readline() == "0\n"

    def lock_run(self) -> None:
        """Make the run's folder read-only, although files in it are open."""
        self.order("mount --bind POINT/run POINT/run")
        self.order("mount -o remount,bind,ro POINT/run")

    def fill(self, *, spare_bytes: int = 0) -> None:
        """Leave so many bytes free."""
        size = shutil.disk_usage(self.root).free - spare_bytes
        with (self.root / "filler").open("wb") as file:
            file.write(bytes(max(size, 0)))

    def clear(self) -> None:
        (self.root / "filler").unlink(missing_ok=True)

    def for_sqlite(self) -> None:
        if self.shell is not None:
            pytest.skip("only root can mount a file system where sqlite finds it")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A tmpfs of 8 MB; skipped where none can be mounted."""
    point = tmp_path / "small"
    point.mkdir()
    words = ["sh", "-c", MOUNT, "sh", str(SIZE_BYTES), str(point)]
    if os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0:
        yield Disk(point)
        subprocess.run(["umount", "--lazy", str(point)], check=True)
        return
    if not shutil.which("unshare"):
        pytest.skip("no small file system can be mounted here: not root, and no `unshare`")
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", HOLDER, *words[3:]]
    pipe = subprocess.PIPE
    shell = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert shell.stdout is not None
    if shell.stdout.readline() != "ready\n":
        _, said = shell.communicate()
        pytest.skip(f"no small file system can be mounted here: {said.strip()}")
    yield Disk(point, shell)
    shell.communicate()


class Acting(Tiny):
    """Does something to the disk when a moment comes: (hook, step)."""

    when: tuple[str, int] = ("", 0)
    deed: Any = None

    def _pass(self, hook: str, step: int) -> None:
        if (hook, step) == type(self).when:
            type(self).deed()

    @hookimpl
    def encode_batch(self, encoder, samples):
        self._pass("encode_batch", 0)
        return super().encode_batch(encoder, samples)

    @hookimpl
    def save_weights(self, run, folder):
        self._pass("save_weights", run.moment.step)
        return super().save_weights(run, folder)

    @hookimpl
    def validate(self, run):
        self._pass("validate", run.moment.step)
        return super().validate(run)


def acting(hook: str, step: int, deed: Any) -> dict[str, type]:
    made = type("Acting", (Acting,), {"when": (hook, step), "deed": staticmethod(deed)})
    return {"tiny": made}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def unharmed(folder: Path) -> Finished:
    return train(folder, plugins={}, settings=SAMPLES, output="unharmed")


def on(disk: Disk, folder: Path, plugins: dict[str, type], *, cache: bool = False) -> Finished:
    """Train with the output folder, and if wanted the cache, on the small disk."""
    settings = {**SAMPLES, "output_dir": str(disk.root / "run")}
    if cache:
        settings["cache_dir"] = str(disk.root / "cache")
    return attempt(folder, plugins=plugins, settings=settings, output="small")


def end_of(disk: Disk, folder: Path, *, cache: bool = False) -> Finished:
    """Cure the disk, start the same run again, and return its end."""
    disk.clear()
    done = on(disk, folder, {"tiny": Tiny}, cache=cache)
    assert done.error is None
    return Finished(disk.root / "run", done.said, done.draws)


def test_full_while_the_cache_is_filled(disk: Disk, folder: Path, unharmed: Finished):
    disk.for_sqlite()
    done = on(disk, folder, acting("encode_batch", 0, disk.fill), cache=True)
    assert isinstance(done.error, TrainerError), done.error
    text = str(done.error)
    assert "disk is full" in text
    assert "--cache_dir" in text
    assert "start the same command again" in text
    assert not list((disk.root / "cache").rglob("*.tmp"))
    again = end_of(disk, folder, cache=True)
    assert again.weights() == unharmed.weights()
    assert again.events == unharmed.events


def test_full_before_the_run_begins(disk: Disk, folder: Path):
    disk.for_sqlite()
    disk.fill()
    done = on(disk, folder, {}, cache=True)
    assert isinstance(done.error, TrainerError), done.error
    assert "disk is full" in str(done.error)
    assert "--cache_dir" in str(done.error)


def test_full_while_a_checkpoint_is_written(disk: Disk, folder: Path, unharmed: Finished):
    deed = lambda: disk.fill(spare_bytes=80_000)  # noqa: E731  # room for some of its files
    done = on(disk, folder, acting("save_weights", 4, deed))
    assert isinstance(done.error, CheckpointError), done.error
    assert "No space left" in str(done.error)
    assert "earlier checkpoints are untouched" in str(done.error)
    left = sorted(path.name for path in (disk.root / "run").iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-2"]
    again = end_of(disk, folder)
    assert any("Going on from" in line and "checkpoint-2" in line for line in again.said)
    assert again.weights() == unharmed.weights()
    assert again.events == unharmed.events


def test_full_in_the_first_validation(disk: Disk, folder: Path, unharmed: Finished):
    done = on(disk, folder, acting("validate", 0, disk.fill))
    assert isinstance(done.error, TrainerError), done.error
    assert "disk is full" in str(done.error)
    assert not list((disk.root / "run").rglob("*.mp4"))
    again = end_of(disk, folder)
    assert again.weights() == unharmed.weights()
    assert again.events == unharmed.events


def test_full_in_a_later_validation_that_the_run_outlives(disk: Disk, folder: Path, unharmed):
    """The samples are left out and said; training goes on as long as a checkpoint can be written."""
    plugins = acting("validate", 2, disk.fill)
    real = plugins["tiny"].save_weights

    def save_weights(self, run, folder, final):
        disk.clear()  # somebody made room
        return real(self, run, folder)

    plugins["tiny"].save_weights = hookimpl(save_weights)
    done = on(disk, folder, plugins)
    assert done.error is None
    assert any("validation of step 2 failed" in line for line in done.said)
    assert not (disk.root / "run" / "validation" / "step-00000002" / "artifacts.json").exists()
    end = Finished(disk.root / "run", done.said, done.draws)
    assert end.weights() == unharmed.weights()
    assert end.steps == unharmed.steps


def test_a_read_only_output_folder_is_refused_at_once(disk: Disk, folder: Path):
    disk.order("mount -o remount,ro POINT")
    done = on(disk, folder, {})
    assert isinstance(done.error, ConfigError), done.error
    assert "output_dir" in str(done.error)
    assert "Name another folder" in str(done.error)
    assert done.draws == ()


def test_read_only_in_the_middle_of_a_run(disk: Disk, folder: Path, unharmed: Finished):
    done = on(disk, folder, acting("save_weights", 4, disk.lock_run))
    assert isinstance(done.error, TrainerError), done.error
    assert "ead-only file system" in str(done.error)
    assert "earlier checkpoints are untouched" in str(done.error)
    disk.order("umount --lazy POINT/run")
    again = end_of(disk, folder)
    assert any("Going on from" in line and "checkpoint-2" in line for line in again.said)
    assert again.weights() == unharmed.weights()
    assert again.events == unharmed.events


def test_a_large_file_is_streamed_to_the_same_bytes(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    tensors = {
        "b": torch.arange(300_000.0).view(3, -1).t(),
        "a": torch.ones(5, dtype=torch.bfloat16),
    }
    files.write_tensors(disk.root / "at-once", tensors)
    monkeypatch.setattr(files, "MOST_BYTES_AT_ONCE", 0)
    files.write_tensors(disk.root / "streamed", tensors)
    one, other = disk.root / "at-once", disk.root / "streamed"
    assert one.read_bytes() == other.read_bytes()
    assert one.stat().st_mode == other.stat().st_mode
    disk.fill(spare_bytes=100_000)
    before = other.read_bytes()
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_tensors(other, {**tensors, "c": torch.ones(9)})
    assert caught.value.errno == 28
    assert other.read_bytes() == before
    assert not list(disk.root.glob(".*"))


# --- the index of the cache -------------------------------------------------------------------------


def test_a_locked_index_is_named_and_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "index.sqlite"
    with Store(path) as known:
        known.remember_digest(("/clip", 1, 2), "digest")
    monkeypatch.setattr(store, "TIMEOUT_S", 0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DataError, match=r"index\.sqlite cannot be used.*locked.*--cache_dir"):
        Store(path)
    other.execute("COMMIT")
    other.close()
    with Store(path) as known:
        assert known.digests([("/clip", 1, 2)]) == {"/clip": "digest"}
        assert not known.replaced


def test_a_read_only_index_is_named_and_not_deleted(disk: Disk):
    disk.for_sqlite()
    path = disk.root / "index.sqlite"
    with Store(path) as known:
        known.remember_digest(("/clip", 1, 2), "digest")
    size = path.stat().st_size
    disk.order("mount -o remount,ro POINT")
    with pytest.raises(DataError, match=r"index\.sqlite cannot be used"):
        Store(path)
    assert path.stat().st_size == size


@pytest.mark.parametrize("place", [0, 18, 19, 24, 44, 60, 100, 4000])
def test_a_flipped_byte_in_the_index_is_repaired_or_named(tmp_path: Path, place: int):
    path = tmp_path / "index.sqlite"
    with Store(path) as known:
        for number in range(200):
            known.remember_digest((f"/clip {number:03d}", 1, 2), "digest")
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    stamps = [(f"/clip {number:03d}", 1, 2) for number in range(200)]
    try:
        with Store(path) as known:
            found, said = known.digests(stamps), ""
    except DataError as error:
        found, said = {}, str(error)
    assert set(found) <= {path for path, _, _ in stamps}
    assert not said or "It may be deleted" in said
