"""Runs a stack of blocks over tokens: routes, taps, checkpointing and residency live here.

It knows no model: a network hands it blocks, tokens (B, N, D), what goes with each token, and a
function that calls one block. Nothing is drawn in here. Route ids come with the plan, because an
index that is drawn again in a recompute gives a wrong gradient without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from trainer_core.errors import PluginError
from trainer_core.types import ForwardPlan, Moment, Residency, Route, TapResult

if TYPE_CHECKING:
    from torch import Tensor, nn

CheckpointPolicy = Literal["none", "full"]
"""What is recomputed in the backward pass: nothing, or each block from its input."""

BlockCall = Callable[["nn.Module", "Tensor", Mapping[str, "Tensor"], Mapping[str, Any]], "Tensor"]
"""``call(block, tokens, per_token, shared)`` returns the tokens behind it, shape unchanged."""


@dataclass(frozen=True)
class TokenContext:
    """What blocks get beside the tokens.

    per_token: tensors with one row per token: (1 or B, N, ...). Inside a route the rows of the kept
    tokens are gathered, so that each token keeps its own position code and time embedding.
    shared: anything else (text, time embedding per sample); handed on as it is.
    """

    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)


def gather_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """Return the rows (B, K, ...) of (1 or B, N, ...) that ``ids`` (B, K) names; costs K rows."""
    rows = rows.expand(ids.shape[0], *rows.shape[1:])
    return rows.gather(1, _index(ids, rows))


def scatter_rows(full: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of ``full`` (B, N, ...) with ``rows`` (B, K, ...) in the places of ``ids``."""
    return full.scatter(1, _index(ids, full), rows.to(full.dtype))


def _index(ids: Tensor, like: Tensor) -> Tensor:
    index = ids.reshape(*ids.shape, *(1,) * (like.ndim - 2))
    return index.expand(*ids.shape, *like.shape[2:])


def compose_routes(routes: Iterable[Route], num_blocks: int) -> tuple[Route, ...]:
    """Return the routes sorted by their first block.

    Raises PluginError that names plugins and blocks where a route leaves the stack, ends before it
    starts, or shares a block with another one. Adjacent routes are fine.
    """
    ordered = sorted(routes, key=lambda route: (route.start, route.end, route.plugin))
    for route in ordered:
        if not 0 <= route.start <= route.end < num_blocks:
            raise PluginError(
                f"{_name(route)} does not fit the model, which has {num_blocks} blocks "
                f"(0 to {num_blocks - 1}); start must not be above end. Change that route."
            )
    for first, second in pairwise(ordered):
        if second.start <= first.end:
            raise PluginError(
                f"{_name(first)} and {_name(second)} overlap; a block can lie in one route only. "
                f"Shorten one of them, or leave out one of the plugins."
            )
    return tuple(ordered)


def draw_plan(
    routes: Sequence[Route],
    taps: Iterable[int],
    num_samples: int,
    num_tokens: int,
    moment: Moment,
) -> ForwardPlan:
    """Return the plan of one forward: each route's kept ids, drawn now, and the tapped blocks.

    routes: as :func:`compose_routes` returns them. Ids must be (num_samples, K) int64, ascending, K
    from 1 to num_tokens; PluginError names the plugin otherwise. Values are looked at on the CPU
    only: on an accelerator that would make the host wait.
    """
    drawn = []
    for route in routes:
        ids = route.keep(num_samples, num_tokens, moment)
        _check_ids(route, ids, num_samples, num_tokens)
        drawn.append((route, ids))
    return ForwardPlan(routes=tuple(drawn), taps=tuple(sorted(set(taps))))


def _check_ids(route: Route, ids: Tensor, num_samples: int, num_tokens: int) -> None:
    shape = tuple(ids.shape)
    fits = ids.ndim == 2 and shape[0] == num_samples and 1 <= shape[1] <= num_tokens
    if not fits or ids.dtype != torch.int64:
        raise PluginError(
            f"{_name(route)} must keep ids of shape ({num_samples}, 1 to {num_tokens}), int64; "
            f"it gave {shape}, {ids.dtype}"
        )
    if ids.device.type == "cpu":
        ascending = bool((ids[:, 1:] > ids[:, :-1]).all())
        if not ascending or int(ids.min()) < 0 or int(ids.max()) >= num_tokens:
            raise PluginError(
                f"{_name(route)} must keep ascending ids from 0 to {num_tokens - 1}, each once"
            )


def _name(route: Route) -> str:
    return f"the route of {route.plugin!r} over blocks {route.start} to {route.end}"


class BlockStack:
    """The runner of one stack of blocks. A plain object: the network that owns them registers them.

    blocks: the ModuleList; blocks are looked up at every run and called as modules, so adapters,
    quantised layers and hooks stay in force. policy: see :data:`CheckpointPolicy`; it acts only
    while the blocks are in training mode with gradients on. residency: who moves the weights, None
    for nobody; core sets it. Its "forward" visits surround every computation of a block, the
    recompute of checkpointing included (inside the block's "backward" visit).
    """

    def __init__(self, blocks: nn.ModuleList, *, policy: CheckpointPolicy = "none") -> None:
        self.blocks = blocks
        self.policy = policy
        self.residency: Residency | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def policy(self) -> CheckpointPolicy:
        """The checkpoint policy."""
        return self._policy

    @policy.setter
    def policy(self, policy: CheckpointPolicy) -> None:
        known = get_args(CheckpointPolicy)
        if policy not in known:
            raise PluginError(f"checkpoint policy {policy!r} is not one of {', '.join(known)}")
        self._policy = policy

    def run(
        self,
        tokens: Tensor,
        *,
        call: BlockCall,
        context: TokenContext | None = None,
        plan: ForwardPlan | None = None,
    ) -> tuple[Tensor, dict[int, TapResult]]:
        """Return the tokens (B, N, D) behind the last block, and the taps by block index.

        At a route's first block the kept rows are gathered; behind its last one the processed rows
        go back into the tensor saved at the start, so a dropped token passes unchanged. A tap
        inside a route, its last block included, yields the kept tokens with their ids.
        """
        context = context or TokenContext()
        plan = plan or ForwardPlan()
        self._check(plan)
        starts = {route.start: (route, ids) for route, ids in plan.routes}
        wanted = frozenset(plan.taps)
        taps: dict[int, TapResult] = {}
        saved, per_token = tokens, context.per_token
        route: Route | None = None
        ids: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if index in starts:
                route, ids = starts[index]
                saved, tokens = tokens, gather_rows(tokens, ids)
                per_token = {k: gather_rows(v, ids) for k, v in context.per_token.items()}
            tokens = self._block(index, block, tokens, call, per_token, context.shared)
            if index in wanted:
                taps[index] = TapResult(tokens=tokens, ids=ids)
            if route is not None and ids is not None and index == route.end:
                tokens, per_token = scatter_rows(saved, ids, tokens), context.per_token
                route, ids = None, None
        return tokens, taps

    def _check(self, plan: ForwardPlan) -> None:
        for index in plan.taps:
            if not 0 <= index < len(self.blocks):
                last = len(self.blocks) - 1
                raise PluginError(f"a tap asks for block {index}; the model has blocks 0 to {last}")
        if plan.routes:
            compose_routes((route for route, _ in plan.routes), len(self.blocks))

    def _block(
        self,
        index: int,
        block: nn.Module,
        tokens: Tensor,
        call: BlockCall,
        per_token: Mapping[str, Tensor],
        shared: Mapping[str, Any],
    ) -> Tensor:
        residency = self.residency

        def compute(hidden: Tensor) -> Tensor:
            # Also runs in a recompute, which stops early by an exception: hence finally.
            if residency is None:
                return call(block, hidden, per_token, shared)
            residency.before(index, "forward")
            try:
                return call(block, hidden, per_token, shared)
            finally:
                residency.after(index, "forward")

        with_grad = torch.is_grad_enabled()
        recompute = self.policy == "full" and with_grad and self.blocks.training
        if residency is None or not with_grad:
            return _checkpointed(compute, tokens) if recompute else compute(tokens)
        visit = _BackwardVisit(residency, index, closed_by_input=tokens.requires_grad)
        hidden = _mark(_AfterBackward, tokens, visit)
        with residency.saving(index) if residency.saving is not None else nullcontext():
            hidden = _checkpointed(compute, hidden) if recompute else compute(hidden)
        return _mark(_BeforeBackward, hidden, visit)


def _checkpointed(compute: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    out: Tensor = checkpoint(compute, tokens, use_reentrant=False)
    return out


def _mark(function: type[torch.autograd.Function], tokens: Tensor, visit: _BackwardVisit) -> Tensor:
    out: Tensor = function.apply(tokens, visit)  # type: ignore[no-untyped-call] # torch's own
    return out


class _BackwardVisit:
    """Calls a residency once before and once after the backward of one block."""

    def __init__(self, residency: Residency, index: int, *, closed_by_input: bool) -> None:
        self.residency = residency
        self.index = index
        self.closed_by_input = closed_by_input

    def open(self) -> None:
        self.residency.before(self.index, "backward")
        if not self.closed_by_input:
            # No gradient leaves this block (the first trained one), so nothing marks its end but
            # the end of the whole backward pass.
            torch.autograd.Variable._execution_engine.queue_callback(self.close)

    def close(self) -> None:
        self.residency.after(self.index, "backward")


class _BeforeBackward(torch.autograd.Function):
    """Identity behind a block; its backward comes before the block's."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, visit: _BackwardVisit) -> Tensor:
        ctx.visit = visit
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.visit.open()
        return grads[0], None


class _AfterBackward(torch.autograd.Function):
    """Identity in front of a block; its backward comes after the block's."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, visit: _BackwardVisit) -> Tensor:
        ctx.visit = visit
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.visit.close()
        return grads[0], None
