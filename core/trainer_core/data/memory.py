"""Makes a great many small records without paying for them twice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector of cycles in the block.

    A plan is made of millions of records and holds no cycle; each full pass over them, and over all
    that torch has imported, would take as long as making them.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
