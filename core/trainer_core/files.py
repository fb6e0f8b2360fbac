"""Files that are either whole or absent: digests, atomic writes, tensors and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 22
MOST_NAME_BYTES = 255
MOST_BYTES_AT_ONCE = 1 << 26


def digest_file(path: Path) -> str:
    """Return the BLAKE2b-160 digest of a file's bytes, read as a stream."""
    state = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


class RememberedDigests:
    """Digests of large files, kept in a JSON file by path, size and modification time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, file: Path) -> str:
        """Return the digest of a file; it is read only if it changed since it was last read."""
        status = file.stat()
        key, facts = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        known = self._read()
        if key not in known or known[key][:2] != facts:
            if file.suffix == ".safetensors":
                check_tensors(file)
            known[key] = [*facts, digest_file(file)]
            write_json(self.path, known)
        digest: str = known[key][2]
        return digest

    def _read(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def digest_json(value: Any) -> str:
    """Return the BLAKE2b-160 digest of a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what was written there is forced to the disk and renamed to ``path``.

    After an error nothing is left of it, and ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, force it to the disk, and rename it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all; each is copied to the CPU, contiguous.

    The same tensors and metadata give the same bytes. Large files without metadata are streamed.
    """
    from safetensors.torch import save

    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if not metadata and sum(value.nbytes for value in ready.values()) > MOST_BYTES_AT_ONCE:
        _stream_tensors(path, ready)
        return
    data = save(ready, metadata=dict(metadata) if metadata else None)
    write_bytes(path, _sorted_metadata(data) if metadata else data)


def _stream_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors without a copy of all of them in memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the library leaves a file that only its owner reads
        try:
            save_file(tensors, temporary)
            temporary.chmod(mode)
        except SafetensorError as error:  # a full disk comes in its words
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _sorted_metadata(data: bytes) -> bytes:
    """Return safetensors bytes with the metadata in order; the library writes it in random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ModelError if its header does not fit its bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _no_tensors(path, error) from error


def check_tensors(path: Path) -> None:
    """Read the header of a safetensors file; ModelError if it does not fit the file's bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise _no_tensors(path, error) from error


def _no_tensors(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is no whole safetensors file ({error}); get or write it again")


def blocked(folder: Path) -> str | None:
    """Return why nothing can be written into a folder, there or yet to be made; None if it can."""
    there = folder.absolute()
    if any(len(os.fsencode(part)) > MOST_NAME_BYTES for part in there.parts):
        return f"has a name of more than {MOST_NAME_BYTES} bytes."
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            what = "a file" if there.is_file() else "no folder"
            return f"{there} is {what}, so no folder can be there."
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} cannot be written to."
    except OSError as error:
        return f"cannot be a folder: {error.strerror}."
    return None


def replace_folder(work: Path, final: Path) -> None:
    """Give a finished folder its final name; the folder that had it is deleted."""
    if final.exists():
        remove_folder(final)
    work.rename(final)
    sync(final.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a half-deleted one never carries its old name."""
    doomed = path.with_name(f".{path.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)
