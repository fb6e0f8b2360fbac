"""The C library's heap: large blocks go back to the system when they are freed.

glibc moves the size from which a block gets memory of its own up to 32 MiB as a program frees such
blocks. Tensors below it then lie in one heap with gaps between what lives, and a process on a CPU grows
to far more than its tensors ever take: at the shape of Wan 1.3B to 2.56 GB instead of 1.79.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

LARGE_BYTES = 4 * 2**20
"""Blocks of this size or more have memory of their own."""
M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def give_back_large_blocks(environ: Mapping[str, str] = os.environ) -> bool:
    """Keep large blocks out of the heap, in this process; return whether that was done.

    Nothing is done where another C library or allocator is at work, or the user has set glibc's own
    variables.
    """
    chosen = (
        "MALLOC_MMAP_THRESHOLD_" in environ
        or "malloc.mmap_threshold" in environ.get("GLIBC_TUNABLES", "")
        or "LD_PRELOAD" in environ
    )
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES))
    except (OSError, AttributeError):
        return False
