"""Runs a stack of blocks over tokens: routes, taps, checkpointing and residency live here.

It knows no model: a network hands it blocks, tokens (B, N, D), what goes with each token, and a
function that calls one block. Nothing is drawn in here. Route ids come with the plan, because an
index that is drawn again in a recompute gives a wrong gradient without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import torch

from trainer_core.errors import ConfigError, PluginError, Problem
from trainer_core.recompute import FFN, CheckpointPolicy, Part, checkpointed
from trainer_core.types import ForwardPlan, Moment, Residency, Route, TapResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer_core.settings.core import CoreSettings

BlockCall = Callable[..., "Tensor"]
"""``call(block, tokens, per_token, shared)`` returns the tokens behind it, shape unchanged.

The call of a stack with parts also takes ``part=``, a :data:`trainer_core.recompute.Part`.
"""


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
    while the blocks are in training mode with gradients on, and only on every ``interval``-th block,
    the first one included. parts: names of the parts of a block, where its call knows ``part=``.
    recomputed: those that are recomputed under any policy, such as what a model computes in chunks.
    residency: who moves the weights, None for nobody; core sets it. Its "forward" visits surround every
    computation of a block or of a part, the recompute of checkpointing included (inside the block's
    "backward" visit).
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        *,
        policy: CheckpointPolicy = "none",
        interval: int = 1,
        parts: Iterable[str] = (),
    ) -> None:
        self.blocks = blocks
        self.parts = frozenset(parts)
        self.recomputed: frozenset[str] = frozenset()
        self.policy = policy
        self.interval = interval
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
        if policy == FFN and FFN not in self.parts:
            raise PluginError(f"the model's blocks have no part that is called {FFN!r}")
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
        with_grad = torch.is_grad_enabled()
        trains = with_grad and self.blocks.training
        policy = self.policy if trains and index % self.interval == 0 else "none"
        again = self.recomputed | ({FFN} if policy == FFN else set()) if trains else frozenset()
        visit = partial(_visit, residency, index)

        def compute(hidden: Tensor) -> Tensor:
            # Also runs in a recompute, which stops early by an exception: hence the context.
            with visit():
                if not again:
                    return call(block, hidden, per_token, shared)
                return call(block, hidden, per_token, shared, part=_recomputing(again, visit))

        run: Callable[[Tensor], Tensor] = compute
        if policy in ("full", "keep_attention"):
            run = partial(checkpointed, compute, keep_attention=policy == "keep_attention")
        if residency is None or not with_grad:
            return run(tokens)
        marks = _BackwardVisit(residency, index, closed_by_input=tokens.requires_grad)
        hidden = _mark(_AfterBackward, tokens, marks)
        with residency.saving(index) if residency.saving is not None else nullcontext():
            hidden = run(hidden)
        return _mark(_BeforeBackward, hidden, marks)


def arrange(
    stack: BlockStack, settings: CoreSettings, *, residency: Residency | None = None
) -> None:
    """Let a stack recompute and compile as the settings say; refuse a policy that it has no part for."""
    stack.residency = residency
    if settings.compile_blocks:
        for block in stack.blocks:
            # Dynamic from the start: a new bucket costs nothing, and the blocks share one graph.
            block.compile(dynamic=True)
    policy = settings.gradient_checkpointing_policy
    if not settings.gradient_checkpointing:
        stack.policy = "none"
        return
    if policy == FFN and FFN not in stack.parts:
        raise ConfigError(
            [
                Problem(
                    "gradient_checkpointing_policy",
                    "this model does not tell which part of a block is its feed-forward.",
                    value=policy,
                    way_out="Write full or keep_attention.",
                )
            ]
        )
    stack.policy, stack.interval = policy, settings.gradient_checkpointing_interval


@contextmanager
def _visit(residency: Residency | None, index: int) -> Iterator[None]:
    """Surround a computation of block ``index`` with the visits of who moves its weights."""
    if residency is None:
        yield
        return
    residency.before(index, "forward")
    try:
        yield
    finally:
        residency.after(index, "forward")


def _recomputing(parts: frozenset[str], visit: Callable[[], AbstractContextManager[None]]) -> Part:
    """Return a runner of parts that computes those named in ``parts`` again in the backward."""

    def part(name: str, compute: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        if name not in parts:
            return compute(tokens)
        computed = False

        def again(hidden: Tensor) -> Tensor:
            nonlocal computed
            with (
                visit() if computed else nullcontext()
            ):  # the first time is inside the block's visit
                computed = True
                return compute(hidden)

        return checkpointed(again, tokens)

    return part


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
