"""How much faster training becomes, counting operations only: an upper bound of what a clock shows.

A block over n tokens costs a n + b n^2 + c operations: products with weights, attention, and products
of the text with weights, which no route shortens. Norms, position codes, gathers, the optimiser and
data are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Cost = Sequence[float]
"""Operations of one block's forward: products with weights, attention, products of the text; and, where
there is a fourth, of the first what a recompute leaves out.
"""


@dataclass(frozen=True)
class Passes:
    """How often each part of the forward is computed in a step, backward included.

    spared: how often what a recompute may leave out is left out.
    """

    weights: float
    attention: float
    text: float
    spared: float = 0.0

    def of(self, cost: Cost) -> float:
        """Return the operations of one block in a step."""
        weights, attention, text, *rest = cost
        whole = self.weights * weights + self.attention * attention + self.text * text
        return whole - self.spared * sum(rest)


FORWARD = Passes(1, 1, 1)


def training_passes(*, trains_weights: bool, recomputes: bool) -> Passes:
    """Return the passes of a training step.

    trains_weights: gradients of all weights (full fine-tuning), not only of what flows through them
    (an adapter on frozen weights, whose own small products are left out). recomputes: gradient
    checkpointing. Attention has two products of gradients for each of its own.
    """
    again = 1 if recomputes else 0
    if trains_weights:
        return Passes(3 + again, 3 + again, 3 + again)
    return Passes(2 + again, 3 + again, 1 + again, spared=again)


def total(
    block: Callable[[int], Cost],
    *,
    num_blocks: int,
    num_tokens: int,
    routes: Sequence[tuple[int, int]],
    passes: Passes = FORWARD,
) -> float:
    """Return the operations of a stack of blocks. routes: (number of blocks, tokens kept) of each."""
    routed = sum(blocks for blocks, _ in routes)
    plain = (num_blocks - routed) * passes.of(block(num_tokens))
    return plain + sum(blocks * passes.of(block(kept)) for blocks, kept in routes)


def speed_up(
    block: Callable[[int], Cost],
    *,
    num_blocks: int,
    num_tokens: int,
    routes: Sequence[tuple[int, int]],
    passes: Passes = FORWARD,
) -> float:
    """Return operations without routes over operations with them; arguments as in :func:`total`."""
    size = {"num_blocks": num_blocks, "num_tokens": num_tokens}
    plain = total(block, **size, routes=(), passes=passes)
    return plain / total(block, **size, routes=routes, passes=passes)
