"""Orders and cycles of small graphs, each given as name → the names that come before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def in_order(before: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names such that each follows those before it; ties keep the mapping's order.

    Names in a cycle keep the mapping's order too: :func:`cycle` reports them.
    """
    left, done = list(before), list[str]()
    while left:
        ready = [name for name in left if not any(other in left for other in before[name])]
        name = ready[0] if ready else left[0]
        left.remove(name)
        done.append(name)
    return done


def cycle(before: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one cycle as ``[a, b, ..., a]``, or an empty list."""
    for start in before:
        path = _path_back(before, start)
        if path:
            return path
    return []


def _path_back(before: Mapping[str, Sequence[str]], start: str) -> list[str]:
    """Return the shortest path from ``start`` to itself."""
    paths, seen = [[start]], set[str]()
    for path in paths:
        for name in before.get(path[-1], ()):
            if name == start:
                return [*path, name]
            if name not in seen:
                seen.add(name)
                paths.append([*path, name])
    return []
