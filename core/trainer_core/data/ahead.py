"""Does work in a thread: a little ahead of where its results are wanted, or behind where it arises."""

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


class Behind:
    """Does work in a thread, in order, while its giver goes on; at most a few things wait.

    An error of the work comes out of a later :meth:`give`, or at the end of the block.
    """

    def __init__(self, most: int = GROUPS_AHEAD) -> None:
        self.most = most
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: list[Future[None]] = []

    def give(self, work: Callable[[], None]) -> None:
        """Let ``work`` be done; waits while too much lies there."""
        self._waiting.append(self._pool.submit(work))
        while len(self._waiting) > self.most:
            self._waiting.pop(0).result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._waiting:
                future = self._waiting.pop(0)
                if kind is None:
                    future.result()
        finally:
            self._pool.shutdown(wait=True)
