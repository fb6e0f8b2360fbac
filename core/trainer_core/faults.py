"""Faults of the disk and of files, told as sentences: what is wrong, and what is safe."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from trainer_core.errors import ModelError, TrainerError

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
    """Turn a fault of the disk or of a weights file into a TrainerError with the way out.

    Others pass as they are.
    """
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        if (damage := _damage(error)) is not None:
            raise damage from error
        if not isinstance(error, OSError) or error.errno not in FAULTS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise TrainerError(
            f"{FAULTS[error.errno]}{where}: the run had to stop. Checkpoints and cache entries are "
            "written whole or not at all, so nothing is damaged: cure it, or name other folders with "
            "--output_dir and --cache_dir, and start the same command again."
        ) from error


def _damage(error: BaseException) -> ModelError | None:
    """Return what to tell if a library could not parse a safetensors file, at first or further down."""
    from safetensors import SafetensorError

    deeper: BaseException | None = error
    while deeper is not None and not isinstance(deeper, SafetensorError):
        deeper = deeper.__cause__ or deeper.__context__
    if deeper is None:
        return None
    what = str(deeper) if deeper is error else f"{str(error).strip().rstrip('.')} ({deeper})"
    told = ModelError(
        f"a safetensors file is damaged or cut short: {what}. Get or write it again, and start the same "
        "command again; nothing else is damaged."
    )
    vars(told)["__notes__"] = list(getattr(error, "__notes__", ()))  # who was loading
    return told
