"""Which files a dataset has, in a fixed order. Nothing is opened here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer_core.data.types import MediaKind

VIDEO = frozenset(
    f".{end}"
    for end in (
        "mp4 mov m4v mkv webm avi gif mpg mpeg ts wmv flv ogv 3gp".split()  # noqa: SIM905
    )
)  # fmt: skip
IMAGE = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])


@dataclass(frozen=True, slots=True)
class Found:
    """A file below a folder. name: relative, with slashes. problem: why it is unreadable."""

    name: str
    kind: MediaKind | None
    size: int
    mtime_ns: int
    problem: str = ""


def kind_of(name: str) -> MediaKind | None:
    """Return what a file's ending says it is, None for other files."""
    ending = os.path.splitext(name)[1].lower()
    return "video" if ending in VIDEO else "image" if ending in IMAGE else None


def listing(folder: Path) -> dict[str, Found]:
    """Return every file below a folder by its relative name, sorted; hidden ones are left out.

    Links are followed, a loop of links is walked once.
    """
    found = {item.name: item for item in _walk(str(folder), "", set())}
    return dict(sorted(found.items()))


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[Found]:
    try:
        facts = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        yield Found(prefix.rstrip("/"), None, 0, 0, f"{error.strerror or error}")
        return
    if (facts.st_dev, facts.st_ino) in seen:
        return
    seen.add((facts.st_dev, facts.st_ino))
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        try:
            if entry.is_dir():
                yield from _walk(entry.path, f"{name}/", seen)
                continue
            facts = entry.stat()
        except OSError as error:
            yield Found(name, kind_of(name), 0, 0, f"{error.strerror or error}")
            continue
        yield Found(name, kind_of(name), facts.st_size, facts.st_mtime_ns)
