"""What was found out about files, remembered in one sqlite file in the cache folder.

Everything in it can be found out again, so a damaged file is replaced. Rows are keyed by path and
hold only as long as size and time of change stay the same. A killed process loses at most the last
rows.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainer_core.data.types import MediaKind, Probe
from trainer_core.errors import DataError

Stamp = tuple[str, int, int]
"""(absolute path, size in bytes, time of change in ns)."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS probes (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, kind TEXT,
  frames INTEGER, rate TEXT, width INTEGER, height INTEGER, problem TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, digest TEXT)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER,
  times INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, text TEXT)
  WITHOUT ROWID;
"""
VERSION = 1
PENDING_ROWS = 500
TIMEOUT_S = 60
FEW_ROWS = 500
"""So many rows are asked for by name; for more, all between the first and the last are read."""


class Store:
    """The remembered facts. Writes are gathered; ``flush`` or leaving the block commits them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = False
        self._lock = threading.RLock()
        self._pending: list[tuple[str, tuple[Any, ...]]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.OperationalError as error:
            raise self._fault(error) from error
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self.replaced = True
            self._connection = self._open()

    def _fault(self, error: sqlite3.Error) -> DataError:
        """Return what to tell of an index that is sound but locked, read-only or on a full disk."""
        return DataError(
            f"the index of the cache {self.path} cannot be used: {error}. Make room or make it writable, "
            "let a run that uses it end, or name another --cache_dir, and start the same command again. "
            "It may be deleted: all in it is found out again."
        )

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_S, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError("other version")
            connection.executescript(SCHEMA)
            if not version:  # writing waits for the disk, so only once
                connection.execute(f"PRAGMA user_version={VERSION}")
            connection.execute("SELECT 1 FROM probes LIMIT 1").fetchall()
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit and close."""
        with self._lock:
            try:
                self.flush()
            finally:
                self._connection.close()

    def flush(self) -> None:
        """Commit what is pending."""
        with self._lock:
            try:
                for statement, values in self._pending:
                    self._connection.execute(statement, values)
                self._connection.commit()
            except sqlite3.DatabaseError as error:
                raise self._fault(error) from error
            self._pending.clear()

    def _write(self, table: str, *values: Any) -> None:
        marks = ",".join("?" * len(values))
        with self._lock:
            self._pending.append((f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values))
            if len(self._pending) >= PENDING_ROWS:
                self.flush()

    def _rows(self, table: str, stamps: Sequence[Stamp]) -> Iterable[tuple[Any, ...]]:
        asked = {path: (size, mtime) for path, size, mtime in stamps}
        if len(asked) <= FEW_ROWS:
            names, where = list(asked), f"path IN ({','.join('?' * len(asked))})"
        else:
            names, where = [min(asked), max(asked)], "path BETWEEN ? AND ?"
        with self._lock:
            self.flush()
            try:
                for row in self._connection.execute(f"SELECT * FROM {table} WHERE {where}", names):
                    if asked.get(row[0]) == row[1:3]:
                        yield row
            except sqlite3.DatabaseError as error:
                raise self._fault(error) from error

    def probes(self, stamps: Sequence[Stamp]) -> dict[str, Probe | str]:
        """Return path → what the header said, or why it is unreadable; unknown ones are absent."""
        found: dict[str, Probe | str] = {}
        # files of one kind share a probe: 100,000 files stay small
        shared: dict[tuple[Any, ...], Probe] = {}
        for path, _, _, kind, frames, rate, width, height, problem in self._rows("probes", stamps):
            key = (kind, frames, rate, width, height)
            if not problem and key not in shared:
                shared[key] = Probe(kind, frames, Fraction(rate), width, height)
            found[path] = problem or shared[key]
        return found

    def remember_probe(self, stamp: Stamp, probe: Probe | str) -> None:
        """Keep a probe, or the sentence why there is none."""
        if isinstance(probe, str):
            kind: MediaKind | None = None
            self._write("probes", *stamp, kind, 0, "0", 0, 0, probe)
        else:
            self._write(
                "probes", *stamp, probe.kind, probe.frames, str(probe.rate), probe.width,
                probe.height, "",
            )  # fmt: skip

    def digests(self, stamps: Sequence[Stamp]) -> dict[str, str]:
        """Return path → digest of the bytes; unknown ones are absent."""
        return {row[0]: row[3] for row in self._rows("digests", stamps)}

    def remember_digest(self, stamp: Stamp, digest: str) -> None:
        """Keep the digest of a file's bytes."""
        self._write("digests", *stamp, digest)

    def texts(self, stamps: Sequence[Stamp]) -> dict[str, str]:
        """Return path → contents of small text files; unknown ones are absent."""
        return {row[0]: row[3] for row in self._rows("texts", stamps)}

    def remember_text(self, path: str, size: int, mtime_ns: int, text: str) -> None:
        """Keep the contents of a small text file."""
        self._write("texts", path, size, mtime_ns, text)

    def failures(self, stamps: Sequence[Stamp]) -> dict[str, int]:
        """Return path → in how many runs it could not be read; others are absent."""
        return {row[0]: row[3] for row in self._rows("failures", stamps)}

    def remember_failure(self, stamp: Stamp, times: int) -> None:
        """Keep in how many runs a file could not be read."""
        self._write("failures", *stamp, times)

    def forget(self, path: str) -> None:
        """Drop what was found out about a file, so that it is looked at again."""
        with self._lock:
            self.flush()
            for table in ("probes", "failures"):
                self._connection.execute(f"DELETE FROM {table} WHERE path = ?", (path,))
            self._connection.commit()
