"""The captions of a dataset's files. A file without one is skipped, with the reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from trainer_core.data.sources import Found
from trainer_core.data.store import Store
from trainer_core.data.types import Dataset
from trainer_core.errors import DataError


class NoCaption(Exception):
    """Why a file has no caption."""


Reader = Callable[[str], tuple[str, ...]]
"""Returns the captions of a file, alternatives of which one is drawn per use."""

TABLES = {"jsonl": "metadata.jsonl", "csv": "captions.csv", "parquet": "captions.parquet"}


def caption_reader(dataset: Dataset, files: Mapping[str, Found], store: Store) -> Reader:
    """Return the reader for ``caption_strategy``; it raises NoCaption for a file without one."""
    if dataset.caption_strategy == "instanceprompt":
        prompt = (dataset.instance_prompt or "",)
        return lambda name: prompt
    if dataset.caption_strategy == "filename":
        return _from_name
    if dataset.caption_strategy == "textfile":
        return _TextFiles(dataset.folder, files, store)
    return _from_table(_rows(dataset), dataset)


def lines_of(text: str) -> tuple[str, ...]:
    """Return the captions of a text: one per line, empty lines left out."""
    return tuple([stripped for line in text.splitlines() if (stripped := line.strip())])


def _from_name(name: str) -> tuple[str, ...]:
    text = " ".join(PurePosixPath(name).stem.replace("_", " ").split())
    if not text:
        raise NoCaption("its name holds no words")
    return (text,)


class _TextFiles:
    """Captions in a ``.txt`` beside each file, remembered by size and time of change."""

    def __init__(self, folder: Path, files: Mapping[str, Found], store: Store) -> None:
        self.root, self.files, self.store = str(folder), files, store
        wanted = [
            (f"{self.root}/{name}", item.size, item.mtime_ns)
            for name, item in files.items()
            if name.endswith(".txt")
        ]
        self.known = store.texts(wanted)

    def __call__(self, name: str) -> tuple[str, ...]:
        beside = name[: name.rfind(".")] + ".txt"
        found = self.files.get(beside)
        if found is None:
            raise NoCaption(f"its caption {beside} is missing")
        path = f"{self.root}/{beside}"
        text = self.known.get(path)
        if text is None:
            try:
                text = Path(path).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise NoCaption(f"its caption {beside} is not UTF-8") from None
            except OSError as error:
                raise NoCaption(f"its caption {beside}: {error.strerror}") from None
            self.store.remember_text(path, found.size, found.mtime_ns, text)
        captions = lines_of(text)
        if not captions:
            raise NoCaption(f"its caption {beside} is empty")
        return captions


def _from_table(rows: Mapping[str, tuple[str, ...]], dataset: Dataset) -> Reader:
    table = TABLES[dataset.caption_strategy]
    shown = dataset.caption_file.name if dataset.caption_file else table

    def read(name: str) -> tuple[str, ...]:
        captions = rows.get(name)
        if captions is None:
            raise NoCaption(f"{shown} has no row for it")
        if not captions:
            raise NoCaption(f"its caption in {shown} is empty")
        return captions

    return read


def _rows(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    path = dataset.caption_file or dataset.folder / TABLES[dataset.caption_strategy]
    names, texts = dataset.filename_column, dataset.caption_column
    load = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[dataset.caption_strategy]
    try:
        rows = load(path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"dataset {dataset.id}: the captions in {path} cannot be read: {error}. "
            "Correct the file, or set caption_file."
        ) from None
    result: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if names not in row or texts not in row:
            raise DataError(
                f"dataset {dataset.id}: {path} has the columns {', '.join(map(str, row))}; "
                f"{names!r} and {texts!r} are needed. Set filename_column and caption_column."
            )
        value = row[texts]
        parts = value if isinstance(value, list | tuple) else [value]
        result[str(row[names])] = tuple(
            line for part in parts if part is not None for line in lines_of(str(part))
        )
    return result


def _jsonl(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be an object")
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError(
            "caption_strategy parquet needs the package pyarrow, which is not installed. "
            "Install it, or write the captions as jsonl or csv."
        ) from None
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows
