"""Deletes media that cannot be read, on request: only after a second look, and never without a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from trainer_core.data.decode import first_frame
from trainer_core.data.plan import DataPlan
from trainer_core.data.probe import Broken, Unreadable, probe, reason
from trainer_core.data.sources import kind_of
from trainer_core.data.store import Store
from trainer_core.data.types import MediaFile
from trainer_core.files import digest_file

LOG = "deleted.jsonl"
LOOKS = 2


def delete_broken(plan: DataPlan, store: Store, say: Callable[[str], None]) -> None:
    """Look again at every file that cannot be read, and delete it when it failed in an earlier run.

    What is readable but not used (too short, too small, no caption) and what merely cannot be opened
    now (permissions, a disk that fails) is never deleted. Each deletion is first written to
    ``deleted.jsonl`` in the cache folder: path, reason, digest, size, time.
    """
    files = [file for file in plan.files if file.broken]
    before = store.failures([plan.stamp_of(file) for file in files])
    for file in files:
        path, stamp = plan.path_of(file), plan.stamp_of(file)
        why = _second_look(path)
        if why is None:
            store.forget(stamp[0])
            say(f"{path} can be read after all; the next run uses it")
        elif isinstance(why, Broken):
            times = min(before.get(stamp[0], 0) + 1, LOOKS)
            store.remember_failure(stamp, times)
            if times < LOOKS:
                say(f"{path}: {why}; it is deleted if it fails again in another run")
            else:
                say(f"{path}: {why}; {_delete(plan, file, str(why))}")


def _second_look(path: Path) -> Unreadable | None:
    """Return why a file cannot be read, None if its first frame can."""
    kind = kind_of(path.name)
    assert kind is not None
    try:
        probe(path, kind)
        first_frame(path, kind)
    except Unreadable as error:
        return error
    return None


def _delete(plan: DataPlan, file: MediaFile, why: str) -> str:
    """Log and delete a file; return what was done."""
    path, folder = plan.path_of(file), plan.datasets[file.dataset].folder
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            return "it is not deleted, since it lies outside of the dataset's folder"
        facts = path.stat()
        if (facts.st_size, facts.st_mtime_ns) != (file.size, file.mtime_ns):
            return "it is not deleted, since it has changed"
        _log(plan.backends.index.with_name(LOG), path, why, facts.st_size)
        path.unlink()
    except OSError as error:
        return f"it cannot be deleted: {reason(error)}"
    file.skipped = f"{why}; deleted"
    return "deleted after it failed twice"


def _log(log: Path, path: Path, why: str, size: int) -> None:
    """Append a line and force it to the disk, before the file goes."""
    line = {
        "path": str(path.absolute()), "reason": why, "digest": digest_file(path), "size": size,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
