"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer_bitsandbytes.optimizers import FIXED, KINDS, SMALLEST, moments, page_again
from trainer_core.errors import ConfigError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import ParameterGroup, PluginInfo

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainer_core.run import Run

DEVICES = ("cuda", "cpu")


class BitsAndBytes:
    """Builds the optimisers whose names begin with ``bnb-``."""

    info = PluginInfo(
        summary="Optimisers of bitsandbytes: Lion, AdamW, AdEMAMix, in 8 bits, paged",
        provides=("optimizer",),
        values=tuple(f"optimizer={name}" for name in KINDS),
    )

    def __init__(self, settings: Any = None) -> None:
        self._paged: Optimizer | None = None

    def check(self, run: Run) -> None:
        """Refuse arguments and devices that do not go with the optimiser, before any work."""
        name = run.settings.optimizer
        if name not in KINDS:
            return
        if run.device.type not in DEVICES:
            text = f"runs on CUDA and on the CPU, not on {run.device.type}."
            raise ConfigError(
                [Problem("optimizer", text, name, way_out="Write optimi-lion or adamw.")]
            )
        from trainer_core.optim import nothing

        self._build(run, nothing())

    @hookimpl
    def build_optimizer(self, run: Run, groups: Sequence[ParameterGroup]) -> Optimizer | None:
        """Return the optimiser that the settings name, None if it is none of these."""
        kind = KINDS.get(run.settings.optimizer)
        if kind is None:
            return None
        from trainer_core.optim import param_groups

        if run.sketch is not None:
            return self._sketched(run, groups)
        optimizer = self._build(run, param_groups(run.settings, groups))
        if kind.paged and run.device.type == "cpu":
            run.say_once(f"{run.settings.optimizer}: nothing is paged, since the run is on the CPU")
        elif kind.paged:
            self._paged = optimizer
        return optimizer

    def _sketched(self, run: Run, groups: Sequence[ParameterGroup]) -> Optimizer:
        """Return what has the optimiser's moments, while a run is planned."""
        from trainer_core.optim import param_groups
        from trainer_core.planner.sketch import Moments
        from trainer_core.settings.arguments import parse_arguments

        kind = KINDS[run.settings.optimizer]
        smallest = parse_arguments(run.settings.optimizer_config).get("min_8bit_size", SMALLEST)
        return Moments(
            param_groups(run.settings, groups), partial(moments, kind=kind, smallest=smallest)
        )

    def _build(self, run: Run, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from trainer_core.optim import construct

        kind = KINDS[run.settings.optimizer]
        factory = kind.load(paged=kind.paged and run.device.type != "cpu")
        return construct(
            factory, groups, settings=run.settings, defaults=kind.defaults, fixed=FIXED
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: moments and counters are the optimiser's own state, which core saves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Page the moments that core has just restored."""
        if self._paged is not None:
            page_again(self._paged)
