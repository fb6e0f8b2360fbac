"""Which files a dataset has, in a fixed order. Nothing is opened here."""

from __future__ import annotations

import os
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from trainer_core.data.types import MediaKind

VIDEO = frozenset(
    f".{end}"
    for end in (
        "mp4 mov m4v mkv webm avi gif mpg mpeg ts wmv flv ogv 3gp".split()  # noqa: SIM905
    )
)  # fmt: skip
IMAGE = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
KINDS: dict[str, MediaKind] = {**dict.fromkeys(VIDEO, "video"), **dict.fromkeys(IMAGE, "image")}


class Found(NamedTuple):
    """A file below a folder. name: relative, with slashes. problem: why it is unreadable."""

    name: str
    kind: MediaKind | None
    size: int
    mtime_ns: int
    problem: str = ""


def kind_of(name: str) -> MediaKind | None:
    """Return what a file's ending says it is, None for other files."""
    return KINDS.get(name[name.rfind(".") :].lower())


def listing(folder: Path) -> dict[str, Found]:
    """Return every file below a folder by its relative name, sorted; hidden ones are left out.

    Links are followed, a loop of links is walked once.
    """
    found: list[Found] = []
    _walk(str(folder), "", set(), found)
    found.sort(key=itemgetter(0))
    return {item.name: item for item in found}


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]], found: list[Found]) -> None:
    try:
        facts = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        found.append(Found(prefix.rstrip("/"), None, 0, 0, f"{error.strerror or error}"))
        return
    if (facts.st_dev, facts.st_ino) in seen:
        return
    seen.add((facts.st_dev, facts.st_ino))
    folders = []
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            continue
        kind, name = kind_of(name), prefix + name
        try:
            if not name.isascii() and (shown := _escaped(name)) != name:
                found.append(Found(shown, kind, 0, 0, "its name is not UTF-8; rename it"))
            elif entry.is_dir():
                folders.append(entry.name)
            else:
                facts = entry.stat()
                found.append(Found(name, kind, facts.st_size, facts.st_mtime_ns))
        except OSError as error:
            found.append(Found(name, kind, 0, 0, f"{error.strerror or error}"))
    # in order: of two links to one folder the first one counts
    for name in sorted(folders):
        _walk(f"{folder}/{name}", f"{prefix}{name}/", seen, found)


def _escaped(name: str) -> str:
    """Return a name that can be printed and stored; it differs only for one that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
