"""Encoder outputs on disk, content-addressed. A damaged entry is never trained on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.files import digest_json, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

PLAIN, PACKED = ".safetensors", ".safetensors.zst"
ZSTD_LEVEL = 3
STALE_S = 3600


class Damaged(Exception):
    """An entry whose bytes are not what was written. It has been deleted."""


def clip_key(encoder: str, *, source: str, frames: str, crop: str) -> str:
    """Return the key of a clip: encoder identity, bytes of the source, frame plan, crop plan."""
    text = "\x1f".join(("clip", encoder, source, frames, crop))
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def caption_key(encoder: str, caption: str) -> str:
    """Return the key of a caption under an encoder identity."""
    text = "\x1f".join(("caption", encoder, caption))
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def identity_key(name: str, identity: Mapping[str, Any]) -> str:
    """Return the digest of an encoder's name and identity."""
    return digest_json({"encoder": name, "identity": dict(identity)})


class Cache:
    """Entries in one folder. ``known`` answers from one listing, without opening an entry."""

    def __init__(self, folder: Path, *, compress: bool) -> None:
        self.folder, self.compress = folder, compress
        self._known: set[str] = set()
        for name in _folders(folder):
            entries = os.listdir(folder / name)
            self._known.update(e.partition(".")[0] for e in entries if e.endswith((PLAIN, PACKED)))
            for entry in entries:
                if entry.endswith(".tmp"):
                    _remove_stale(folder / name / entry)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def path(self, key: str, ending: str) -> Path:
        """Return where an entry lies."""
        return self.folder / key[:2] / (key + ending)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry, whole or not at all."""
        from safetensors.torch import save

        ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        data = save(ready, metadata={"digest": tensors_digest(ready)})
        ending = PLAIN
        if self.compress:
            import zstandard

            ending = PACKED
            data = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(data)
        write_bytes(self.path(key, ending), data)
        self._known.add(key)

    def read(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of an entry; raises Damaged after deleting what is not whole."""
        for ending in (PACKED, PLAIN):
            path = self.path(key, ending)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            tensors = _parsed(data, packed=ending == PACKED)
            if tensors is not None:
                return tensors
            path.unlink(missing_ok=True)
            self._known.discard(key)
            raise Damaged(str(path))
        self._known.discard(key)
        raise Damaged(f"{self.path(key, PLAIN)} (missing)")


def _remove_stale(path: Path) -> None:
    """Delete what a process left that was killed while it wrote; others may be writing now."""
    try:
        if path.stat().st_mtime < time.time() - STALE_S:
            path.unlink()
    except FileNotFoundError:
        pass


def _folders(folder: Path) -> list[str]:
    try:
        return [e.name for e in os.scandir(folder) if len(e.name) == 2 and e.is_dir()]
    except FileNotFoundError:
        return []


def _parsed(data: bytes, *, packed: bool) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if packed:
            import zstandard

            try:
                data = zstandard.ZstdDecompressor().decompress(data)
            except zstandard.ZstdError:
                return None
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return tensors if metadata.get("digest") == tensors_digest(tensors) else None


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of names, dtypes, shapes and bytes of CPU tensors."""
    import torch

    state = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        state.update(f"{name}\x1f{value.dtype}\x1f{tuple(value.shape)}\x1f".encode())
        state.update(value.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
