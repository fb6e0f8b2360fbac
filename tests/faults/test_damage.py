"""Damaged checkpoints and cache entries: repaired, passed over or refused, never trained with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer_core import checkpoint as checkpoints
from trainer_core import hookimpl
from trainer_core.errors import CheckpointError, ModelError
from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_core.testing.tiny import Tiny

SETTINGS: dict[str, Any] = {
    "max_train_steps": 6,
    "checkpoint_step_interval": 2,
    "use_ema": True,
    "tiny_layers": 2,
}
Damage = Callable[[Path], None]


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cut the second half off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and tensor bytes of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: dict[str, Any], body: bytes, *, says: int | None = None) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes((len(text) if says is None else says).to_bytes(8, "little") + text + body)


def last(header: dict[str, Any]) -> str:
    return max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


def lie_header_length(path: Path) -> None:
    """The header says that it is a terabyte long."""
    header, body = parts(path)
    put(path, header, body, says=1 << 40)


def lie_end(path: Path) -> None:
    """The last tensor is said to reach beyond the end of the file."""
    header, body = parts(path)
    header[last(header)]["data_offsets"][1] += 1 << 20
    put(path, header, body)


def lie_shape_too_large(path: Path) -> None:
    """A shape says more than the bytes of its tensor hold."""
    header, body = parts(path)
    header[last(header)]["shape"] = [1 << 30]
    put(path, header, body)


def lie_shape(path: Path) -> None:
    """Every shape of more than one dimension is turned into a flat one of as many numbers."""
    header, body = parts(path)
    for entry in header.values():
        rows = entry.get("shape", [])
        if len(rows) > 1:
            entry["shape"] = [rows[0] * rows[1]]
    put(path, header, body)


def drop_one(path: Path) -> None:
    """The last tensor is gone, header and bytes fit."""
    header, body = parts(path)
    gone = header.pop(last(header))
    put(path, header, body[: gone["data_offsets"][0]])


LIES = [lie_header_length, lie_end, lie_shape_too_large]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def unharmed(folder: Path) -> Finished:
    return train(folder, plugins={}, settings=SETTINGS, output="unharmed")


@pytest.fixture(scope="module")
def interrupted(folder: Path, unharmed: Finished) -> Path:
    """A run that ended in step 6, after checkpoint-2 and checkpoint-4."""
    with pytest.raises(Interrupted):
        train(folder, plugins={}, settings=SETTINGS, output="interrupted", crash_at=6)
    assert checkpoints.steps(folder / "interrupted") == [2, 4]
    return folder / "interrupted"


def again(interrupted: Path, output: str, *damages: tuple[str, Damage], **keys: Any) -> Finished:
    """Copy the interrupted run, damage files of the copy, and start it again."""
    copy = interrupted.with_name(output)
    if not copy.exists():
        shutil.copytree(interrupted, copy)
    for file, damage in damages:
        damage(copy / file)
    return attempt(copy.parent, plugins={}, settings={**SETTINGS, **keys}, output=output)


FILES = [
    "manifest.json", "state.json", "settings.json", "optimizer.json", "optimizer.safetensors",
    "ema.safetensors", "tiny.safetensors",
]  # fmt: skip


def test_the_list_of_files_is_whole(interrupted: Path):
    assert sorted(path.name for path in (interrupted / "checkpoint-4").rglob("*")) == sorted(FILES)


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    interrupted: Path, unharmed: Finished, file: str, damage: Damage
):
    name = f"{damage.__name__}-{file}"
    done = again(interrupted, name, (f"checkpoint-4/{file}", damage))
    assert done.error is None, done.error
    assert any(line.startswith("checkpoint-4 is damaged (") for line in done.said)
    assert any("Going on from" in line and "checkpoint-2" in line for line in done.said)
    assert done.weights() == unharmed.weights()
    assert done.events == unharmed.events


def test_all_checkpoints_damaged_is_an_error_with_the_ways_out(interrupted: Path, unharmed):
    both = [(f"checkpoint-{step}/ema.safetensors", flip) for step in (2, 4)]
    done = again(interrupted, "both", *both)
    assert isinstance(done.error, CheckpointError), done.error
    assert "ema.safetensors was changed" in str(done.error)
    assert "--resume_from_checkpoint none" in str(done.error)
    assert done.draws == ()
    done = again(interrupted, "both", resume_from_checkpoint="none")
    assert done.error is None
    assert done.weights() == unharmed.weights()


def edit_manifest(path: Path) -> None:
    """Change a digest, as somebody would who wants a changed file to pass."""
    manifest = json.loads(path.read_text())
    manifest["files"]["ema.safetensors"]["blake2b"] = "0" * 40
    path.write_text(json.dumps(manifest))


def edit_format(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize("edit", [edit_manifest, edit_format])
def test_an_edited_manifest_is_found_out(interrupted: Path, unharmed: Finished, edit: Damage):
    done = again(interrupted, edit.__name__, ("checkpoint-4/manifest.json", edit))
    assert done.error is None, done.error
    assert any("checkpoint-4 is damaged (manifest.json was changed)" in s for s in done.said)
    assert done.weights() == unharmed.weights()


def with_a_manifest_that_fits(damage: Damage) -> Damage:
    """Damage a file and write the manifest anew, so that only the file itself tells."""

    def apply(path: Path) -> None:
        damage(path)
        (path.parent / "manifest.json").unlink()
        checkpoints._write_manifest(path.parent)

    return apply


@pytest.mark.parametrize(
    ("file", "damage"),
    [(f, d) for f in FILES if f.endswith(".safetensors") for d in LIES]
    + [(f"{f}.safetensors", d) for f in ("optimizer", "ema") for d in (lie_shape, drop_one)]
    + [("optimizer.safetensors", Path.unlink), ("ema.safetensors", Path.unlink)]
    + [("optimizer.json", cut)],
)
def test_a_file_that_lies_under_a_manifest_that_fits_is_refused(
    interrupted: Path, unharmed: Finished, file: str, damage: Damage
):
    name = f"{damage.__name__}-{file}-fits"
    done = again(interrupted, name, (f"checkpoint-4/{file}", with_a_manifest_that_fits(damage)))
    assert isinstance(done.error, CheckpointError), repr(done.error)
    assert file in str(done.error)
    assert "--resume_from_checkpoint FOLDER" in str(done.error)
    assert done.draws == ()
    done = again(interrupted, name, resume_from_checkpoint="checkpoint-2")
    assert done.error is None, done.error
    assert done.weights() == unharmed.weights()
    assert done.events == unharmed.events


def test_an_event_log_that_was_cut_short_does_not_stop_a_fresh_start(interrupted: Path, unharmed):
    def tear(path: Path) -> None:
        path.write_text(path.read_text() + '{"kind": "end", "step": 6, "fil')

    done = again(interrupted, "torn", ("events.jsonl", tear), resume_from_checkpoint="none")
    assert done.error is None, done.error
    assert done.events == unharmed.events


# --- the cache --------------------------------------------------------------------------------------


def entries(cache: Path) -> dict[str, bytes]:
    found = sorted(cache.rglob("*.safetensors*"))
    return {str(path.relative_to(cache)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("damage", "packed"),
    [(damage, False) for damage in (flip, cut, empty, Path.unlink, *LIES, lie_shape)]
    + [(damage, True) for damage in (flip, cut, empty, Path.unlink)],
)
def test_damaged_cache_entries_are_rebuilt(
    folder: Path, unharmed: Finished, damage: Damage, packed: bool
):
    name = f"{damage.__name__}-{packed}"
    cache = folder / f"cache-{packed}"
    keys = {**SETTINGS, "cache_dir": str(cache), "compress_disk_cache": packed}
    if not cache.exists():
        train(folder, plugins={}, settings=keys, output=f"first-{packed}")
    whole = entries(cache)
    assert len(whole) > 4
    for path in [cache / name for name in whole]:
        damage(path)
    done = attempt(folder, plugins={}, settings=keys, output=name)
    assert done.error is None, done.error
    if damage is not Path.unlink:
        assert sum("was damaged and is rebuilt" in line for line in done.said) > 1
    assert done.weights() == unharmed.weights()
    assert done.events == unharmed.events
    after = entries(cache)
    used = {name for name, data in after.items() if data == whole[name]}
    verified = attempt(folder, plugins={}, settings={**keys, "verify_cache": True}, output="all")
    assert verified.error is None
    assert entries(cache) == whole
    assert len(used) > len(whole) // 2


# --- weights of the model ---------------------------------------------------------------------------


class Reading(Tiny):
    """Reads its weights with the library itself, as a plugin of a stranger would."""

    path = Path()

    @hookimpl
    def load_model(self, run):
        from safetensors.torch import load_file

        model = super().load_model(run)
        model.modules["transformer"].load_state_dict(load_file(type(self).path))
        return model


@pytest.mark.parametrize("damage", [cut, empty, *LIES])
def test_model_weights_that_lie_are_an_error_that_names_the_plugin(
    folder: Path, unharmed: Finished, damage: Damage
):
    path = folder / f"{damage.__name__}.safetensors"
    shutil.copy(unharmed.folder / "tiny.safetensors", path)
    plugins = {"tiny": type("Reading", (Reading,), {"path": path})}
    output = f"reading-{damage.__name__}"
    assert attempt(folder, plugins=plugins, settings=SETTINGS, output="reading").error is None
    damage(path)
    done = attempt(folder, plugins=plugins, settings=SETTINGS, output=output)
    assert isinstance(done.error, ModelError), repr(done.error)
    assert "damaged or cut short" in str(done.error)
    assert any("plugin 'tiny'" in note for note in done.error.__notes__)
    assert done.draws == ()


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_each_file_of_wan_is_named_when_it_lies(folder: Path, component: str):
    wan, umt5 = pytest.importorskip("trainer_wan"), pytest.importorskip("trainer_umt5")
    testing = pytest.importorskip("trainer_wan.testing")
    weights = testing.write_checkpoint(folder / f"wan-{component}", layers=1)
    (path,) = (weights / component).glob("*.safetensors")
    lie_header_length(path)
    keys = {"pretrained_model_name_or_path": str(weights), "max_train_steps": 1}
    plugins = {"wan": wan.Wan, "umt5": umt5.Umt5}
    done = attempt(folder, plugins=plugins, settings=keys, output=f"out-{component}")
    assert isinstance(done.error, ModelError), repr(done.error)
    assert str(path) in str(done.error)
    assert "again" in str(done.error)
    assert done.draws == ()
