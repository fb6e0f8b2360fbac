"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer_core.errors import ConfigError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import ParameterGroup, PluginInfo

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainer_core.run import Run

NAME = "prodigy"
DEFAULTS = {"weight_decay": 1e-2, "use_bias_correction": True, "safeguard_warmup": True}
SMALL_RATE = 0.1
NUM_STATES = 4
"""Tensors of a weight's size that Prodigy keeps for it: both moments, a start and a sum."""


class Prodigy:
    """Builds Prodigy (arXiv 2306.06101), which estimates its step size as it goes."""

    info = PluginInfo(
        summary="Prodigy: an AdamW that finds its own learning rate",
        provides=("optimizer",),
        values=(f"optimizer={NAME}",),
    )

    def __init__(self, settings: Any = None) -> None:
        pass

    def check(self, run: Run) -> None:
        """Refuse arguments that it does not take; tell of a learning rate that is meant for another."""
        if run.settings.optimizer != NAME:
            return
        from trainer_core.optim import nothing

        self._build(run, nothing())
        if run.settings.learning_rate < SMALL_RATE:
            run.say(
                f"prodigy estimates its step size, and learning_rate {run.settings.learning_rate} "
                "multiplies that; the usual value is 1"
            )

    @hookimpl
    def build_optimizer(self, run: Run, groups: Sequence[ParameterGroup]) -> Optimizer | None:
        """Return Prodigy over all groups, None if another optimiser was chosen."""
        if run.settings.optimizer != NAME:
            return None
        from trainer_core.optim import param_groups

        for group in groups:
            if group.learning_rate not in (None, run.settings.learning_rate):
                text = (
                    f"has one step size for all weights, but {group.name} brings a learning rate."
                )
                raise ConfigError(
                    [Problem("optimizer", text, NAME, way_out="Write adamw instead.")]
                )
        if run.sketch is not None:
            from trainer_core.planner.sketch import Moments

            return Moments(
                param_groups(run.settings, groups),
                lambda p: [(tuple(p.shape), p.dtype)] * NUM_STATES,
            )
        return self._build(run, param_groups(run.settings, groups))

    def _build(self, run: Run, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from prodigyopt import Prodigy as Implementation

        from trainer_core.optim import construct

        return construct(Implementation, groups, settings=run.settings, defaults=DEFAULTS)
