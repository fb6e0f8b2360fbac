"""Which blocks a route covers, how many tokens it keeps, and which.

TREAD (Krause et al. 2025, arXiv 2501.04765): tokens drawn at random skip a span of blocks and come
back behind it unchanged. No parameters and no loss of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Span = tuple[int, int]
"""First and last block of a route, both inclusive."""


def resolved(span: Span, num_blocks: int) -> Span | None:
    """Return the span with indices from 0, None where it does not fit so many blocks."""
    start, end = (index + num_blocks if index < 0 else index for index in span)
    return (start, end) if 0 <= start <= end < num_blocks else None


def overlap(first: Span, second: Span) -> bool:
    """Return whether two resolved spans share a block."""
    return first[0] <= second[1] and second[0] <= first[1]


def first_conflict(spans: Sequence[Span]) -> tuple[int, ...] | None:
    """Return the index of a span, or the two of a pair, that fits no model; None if there is none.

    Whether 2 to -2 meets 5 to 8 depends on the number of blocks; only what is wrong for every
    number is found here.
    """
    for index, span in enumerate(spans):
        if not any(resolved(span, count) for count in _counts(span)):
            return (index,)
    for (i, first), (j, second) in combinations(enumerate(spans), 2):
        if not any(_apart(first, second, count) for count in _counts((*first, *second))):
            return i, j
    return None


def _apart(first: Span, second: Span, num_blocks: int) -> bool:
    a, b = resolved(first, num_blocks), resolved(second, num_blocks)
    return a is not None and b is not None and not overlap(a, b)


def _counts(indices: Sequence[int]) -> Iterator[int]:
    """Yield the numbers of blocks at which the order of indices can change, and one beyond all.

    An index i >= 0 and one j < 0 from the end change places at i - j blocks.
    """
    above = [index for index in indices if index >= 0]
    below = [index for index in indices if index < 0]
    edges = {0, *(i + 1 for i in above), *(-j for j in below)}
    edges |= {i - j for i in above for j in below}
    yield from (edge + step for edge in sorted(edges) for step in (-1, 0, 1) if edge + step > 0)
    yield max(edges) + 2


def num_kept(num_tokens: int, drop_ratio: float) -> int:
    """Return how many of the tokens a route keeps, at least one."""
    return max(1, num_tokens - round(num_tokens * drop_ratio))


def keep_at_random(
    num_samples: int,
    num_tokens: int,
    count: int,
    *,
    generator: torch.Generator,
    forced: Tensor | None = None,
) -> Tensor:
    """Return ids (B, K) int64 of tokens drawn for each sample by itself, ascending, K = ``count``.

    Every set of K tokens is equally likely. forced: (B, N) bool on the generator's device; these
    tokens are kept, ``count`` must not be below any sample's number of them. The others are drawn as
    without it.
    """
    import torch

    noise = torch.rand(
        num_samples, num_tokens, generator=generator, device=generator.device, dtype=torch.float32
    )
    if forced is not None:
        noise = noise.masked_fill(forced, -1.0)
    # Stable: equal numbers (2^24 are possible) must be ordered alike at every run.
    ids = noise.argsort(dim=1, stable=True)[:, :count]  # (B, K)
    return ids.sort(dim=1).values
