"""What the trainer sees of the plugin: it checks the routes early and hands them over at set-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from trainer_core.capabilities import Blocks, CountedBlocks, TokenGrid
from trainer_core.errors import ConfigError, PluginError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.run import FORCE_KEEP
from trainer_core.types import Moment, PluginInfo, Route
from trainer_tread import flops, routing
from trainer_tread.config import TreadSettings

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run


class Tread:
    """Lets a share of the tokens, drawn at random, skip spans of blocks in training."""

    info = PluginInfo(
        summary="TREAD: a random share of the tokens skips blocks in training, which makes it faster",
        settings=TreadSettings,
        switch="tread_config",
        requires=(Blocks, TokenGrid),
    )

    def __init__(self, settings: TreadSettings) -> None:
        self.settings = settings

    def check(self, run: Run) -> None:
        """Refuse routes that do not fit the model, where its number of blocks is known already."""
        if run.spec.num_blocks is not None:
            self.spans(run.spec.num_blocks)

    @hookimpl
    def route_tokens(self, run: Run) -> Sequence[Route]:
        """Return the routes in the order of their blocks, and say what they do."""
        assert isinstance(run.model, Blocks)  # the plugin requires it
        num_blocks = min(len(stack) for stack in run.model.stacks().values())
        spans = self.spans(num_blocks)
        forced = Forced(run)
        chosen = [
            Kept(run, index, span, drop_ratio, forced)
            for index, (span, drop_ratio) in enumerate(spans)
        ]
        for sentence in sentences(run, spans, num_blocks):
            run.say(sentence)
        return [Route("tread", *each.span, keep=each.ids) for each in chosen]

    def spans(self, num_blocks: int) -> list[tuple[routing.Span, float]]:
        """Return (span, share dropped) of each route, resolved and sorted.

        Raises ConfigError that names the number of blocks and the route.
        """
        found = []
        for index, route in enumerate(self.settings.tread_config.routes):
            span = routing.resolved(route.span, num_blocks)
            if span is None:
                raise _misfit(f"routes[{index}] ({route}) does not fit the model,", num_blocks)
            found.append((span, index, route))
        found.sort(key=lambda each: each[0])
        for (first, i, one), (second, j, two) in pairwise(found):
            if routing.overlap(first, second):
                text = f"routes[{i}] ({one}) and routes[{j}] ({two}) overlap in the model,"
                raise _misfit(text, num_blocks)
        return [(span, route.selection_ratio) for span, _, route in found]


def _misfit(text: str, num_blocks: int) -> ConfigError:
    text += f" which has {num_blocks} blocks, 0 to {num_blocks - 1} or -{num_blocks} to -1."
    return ConfigError(
        [Problem("tread_config", text, has_value=False, way_out="Change start_layer_idx or "
                 "end_layer_idx there.")]
    )  # fmt: skip


@dataclass
class Forced:
    """The tokens that another plugin asks to keep, counted once a micro-batch for all routes."""

    run: Run
    _counted: tuple[Tensor, Moment, int] | None = field(default=None, init=False)

    def mask(self) -> Tensor | None:
        """Return the mask (B, N) bool, None where nothing is forced."""
        if FORCE_KEEP not in self.run.state:
            return None
        return self.run.state[FORCE_KEEP]

    def most(self, mask: Tensor, shape: tuple[int, int], moment: Moment) -> int:
        """Return the largest number of forced tokens of a sample."""
        import torch

        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise PluginError(
                f"FORCE_KEEP must be a mask of shape {shape}, bool, set anew for each micro-batch; it "
                f"is {tuple(mask.shape)}, {mask.dtype}. The plugin that sets it must be corrected."
            )
        if self._counted is None or self._counted[0] is not mask or self._counted[1] != moment:
            most = int(mask.sum(dim=1).max())  # host sync where the mask is on an accelerator
            self._counted = (mask, moment, most)
        return self._counted[2]


@dataclass
class Kept:
    """Draws the tokens that one route keeps. index: of the route, in the order of blocks."""

    run: Run
    index: int
    span: routing.Span
    drop_ratio: float
    forced: Forced

    def ids(self, num_samples: int, num_tokens: int, moment: Moment) -> Tensor:
        """Return ids (B, K) int64, ascending: a function of seed, moment and route alone."""
        run = self.run
        count, mask = routing.num_kept(num_tokens, self.drop_ratio), self.forced.mask()
        if mask is not None:
            count = max(count, self.forced.most(mask, (num_samples, num_tokens), moment))
            mask = mask.to(run.device, non_blocking=True)
        generator = run.generator("tread/keep", self.index, moment=moment, device=run.device)
        return routing.keep_at_random(
            num_samples, num_tokens, count, generator=generator, forced=mask
        )


def sentences(
    run: Run, spans: Sequence[tuple[routing.Span, float]], num_blocks: int
) -> Sequence[str]:
    """Return what the routes do, in one line, and a warning where they cover an outer block."""
    parts = []
    for (start, end), drop_ratio in spans:
        where = f"block {start}" if start == end else f"blocks {start} to {end}"
        what = "" if parts else " of the tokens"
        parts.append(f"{100 * (1 - drop_ratio):.4g} %{what} in {where}")
    line = f"tread keeps {', '.join(parts)} of {num_blocks}"
    factor = modelled(run, spans, num_blocks)
    if factor is not None:
        line += f"; {factor:.2f}x by the FLOP model at {run.most_tokens} tokens (the largest clip)"
    covered = {start for (start, _), _ in spans} | {end for (_, end), _ in spans}
    outer = [name for name, at in (("first", 0), ("last", num_blocks - 1)) if at in covered]
    if not outer:
        return [line]
    names = " and the ".join(outer)
    return [line, f"tread routes the {names} block; results are usually better without that"]


def modelled(
    run: Run, spans: Sequence[tuple[routing.Span, float]], num_blocks: int
) -> float | None:
    """Return the speed-up of a training step that counting operations predicts, None if unknown."""
    model, tokens, settings = run.model, run.most_tokens, run.settings
    if not isinstance(model, CountedBlocks) or not tokens:
        return None

    def block(num_tokens: int) -> flops.Cost:
        cost = model.block_flops(num_tokens)
        return cost.weights, cost.attention, cost.text, cost.spared

    return flops.speed_up(
        block,
        num_blocks=num_blocks,
        num_tokens=tokens,
        routes=[(b - a + 1, routing.num_kept(tokens, drop)) for (a, b), drop in spans],
        passes=flops.training_passes(
            trains_weights=settings.model_type == "full",
            recomputes=settings.gradient_checkpointing,
        ),
    )
