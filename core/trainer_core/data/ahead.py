"""Does work in a thread a little ahead of where its results are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

I = TypeVar("I")  # noqa: E741  # item and result of a function that runs ahead
R = TypeVar("R")
GROUPS_AHEAD = 2


def ahead(work: Callable[[I], R], items: Iterable[I]) -> Iterator[R]:
    """Yield ``work(item)`` in order, done in a thread a bounded number of items ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > GROUPS_AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
