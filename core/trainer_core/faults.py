"""Faults of the disk, told as sentences: what could not be written, and what is safe."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from trainer_core.errors import TrainerError

FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is missing",
    errno.EPERM: "it is not permitted",
    errno.EIO: "the disk reports an error",
}


@contextmanager
def told() -> Iterator[None]:
    """Turn a fault of the disk into a TrainerError with the way out; others pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise TrainerError(
            f"{FAULTS[error.errno]}{where}: the run had to stop. Checkpoints and cache entries are "
            "written whole or not at all, so nothing is damaged: cure it, or name other folders with "
            "--output_dir and --cache_dir, and start the same command again."
        ) from error
