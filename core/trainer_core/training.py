"""The state of a training in progress, and small answers about it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer_core.answers import groups_of
from trainer_core.capabilities import Model, TokenGrid
from trainer_core.costs import Costs
from trainer_core.errors import PluginError
from trainer_core.types import (
    Batch,
    LossTerm,
    ModelInputs,
    ParameterGroup,
    Route,
    StepOutput,
)

if TYPE_CHECKING:
    from trainer_core.data import Loader
    from trainer_core.ema import Ema
    from trainer_core.flow import SigmaSampler
    from trainer_core.metrics import EventLog, Meter, Trackers
    from trainer_core.persistence import Identity
    from trainer_core.plugins import Host
    from trainer_core.progress import Display
    from trainer_core.run import Run

MODEL = "model"
"""Name of the model's own parameter group; with several experts, what the names begin with."""


@dataclass
class Training:
    """All that the loop works on.

    step: optimiser steps done; saved_step: those in the newest checkpoint. stop: the signal that
    asked for an end, if any. finished: all was done and written. run_id: the same for a run and its
    resumes. reached: role → whether a gradient
    arrived at its first and last weights, until that was looked at.
    """

    run: Run
    host: Host
    display: Display
    events: EventLog
    trackers: Trackers
    meter: Meter
    groups: Sequence[ParameterGroup]
    routes: Sequence[Route]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    sampler: SigmaSampler
    loader: Loader
    eval_batches: Mapping[str, Sequence[Batch]]
    total_steps: int
    run_id: str
    data_digest: str
    identity: Identity
    costs: Costs = attribute(default_factory=Costs)
    step: int = 0
    saved_step: int = 0
    finished: bool = False
    stop: signal.Signals | None = None
    reached: dict[str, list[tuple[str, Tensor]]] = attribute(default_factory=dict)

    def __post_init__(self) -> None:
        """Let the costs of plugins be measured."""
        self.host.observe(self.costs.around)
        self.routes = [self.costs.route(route) for route in self.routes]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of the optimiser."""
        return [p for group in self.groups for _, p in group.parameters]

    @cached_property
    def grid(self) -> TokenGrid | None:
        """The model as a token grid, None if it has none; asking a protocol takes 20 us each time."""
        return self.run.model if isinstance(self.run.model, TokenGrid) else None


def checked_model(model: object, host: Host) -> Model:
    """Return the model, or refuse one that lacks what the protocol or a plugin requires."""
    if not isinstance(model, Model):
        raise PluginError(
            f"load_model returned {type(model).__name__}, which is not a Model (it needs spec, "
            "modules, networks and predict; see trainer_core.capabilities)"
        )
    for name, plugin in host.plugins.items():
        for need in plugin.info.requires:
            if isinstance(need, type) and not isinstance(model, need):
                what = (need.__doc__ or "").strip().splitlines()[0]
                raise PluginError(
                    f"plugin {name!r} needs a model with {need.__name__} ({what}), which "
                    f"{type(model).__name__} is not; leave {name} out of --plugins"
                )
    return model


def trained_parameters(run: Run) -> dict[str, nn.Parameter]:
    """Return the model's parameters that require a gradient, as ``role.name``."""
    return {
        f"{role}.{name}": parameter
        for role, module in run.model.modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def averaged(run: Run) -> Ema | None:
    """Return the average of the model's trained weights, or None if the settings want none."""
    from trainer_core.ema import Ema

    settings = run.settings
    if not settings.use_ema:
        return None
    parameters = trained_parameters(run)
    return Ema(parameters, decay=settings.ema_decay, interval=settings.ema_update_interval)


def belongs(name: str, role: str) -> bool:
    """Return whether a parameter of :func:`trained_parameters` is one of a role."""
    return name.startswith(f"{role}.")


def parameter_groups(run: Run, host: Host) -> list[ParameterGroup]:
    """Return what is trained: the model's parameters, a group for each of several experts, then each
    plugin's ``parameters()``.
    """
    trained = trained_parameters(run)
    if not trained:
        raise PluginError(
            "the model has no parameter to train: with model_type lora an adapter plugin must add "
            "some, with model_type full the model plugin must leave its weights trainable"
        )
    roles = [expert.role for expert in run.spec.experts]
    groups = [ParameterGroup(MODEL, list(trained.items()))]
    if len(roles) > 1:  # an optimiser may count steps by group, and experts take turns
        groups = [
            ParameterGroup(
                f"{MODEL}/{role}", [(n, p) for n, p in trained.items() if belongs(n, role)]
            )
            for role in roles
        ]
    for name, plugin in host.plugins.items():
        if (parameters := getattr(plugin, "parameters", None)) is not None:
            groups.extend(_own_groups(name, groups_of(name, parameters()), groups))
    return groups


def _own_groups(
    plugin: str, found: Sequence[ParameterGroup], others: Sequence[ParameterGroup]
) -> Sequence[ParameterGroup]:
    """Return a plugin's groups after checking that nobody else trains their parameters."""
    taken = {id(parameter) for group in others for _, parameter in group.parameters}
    for group in found:
        for name, parameter in group.parameters:
            if id(parameter) in taken:
                raise PluginError(
                    f"plugin {plugin!r} returned {group.name}.{name} from parameters, which is trained "
                    f"already; leave {plugin} out of --plugins, or tell its author"
                )
            taken.add(id(parameter))
    return found


def spatial_tokens(training: Training, latents: Tensor) -> int:
    """Return the tokens of one frame; latent pixels where the model has no token grid."""
    shape = tuple(latents.shape)
    if training.grid is None:
        return shape[-1] * shape[-2]
    _, rows, columns = training.grid.token_grid(shape)
    return rows * columns


def num_tokens(training: Training, latents: Tensor) -> int:
    """Return the video tokens of a micro-batch."""
    if training.grid is None:
        return 0
    shape = tuple(latents.shape)
    frames, rows, columns = training.grid.token_grid(shape)
    return shape[0] * frames * rows * columns


def prepared(host: Host, run: Run, inputs: ModelInputs) -> ModelInputs:
    """Hand the noised micro-batch through the chain of plugins."""
    for name, prepare in host.calls("prepare_inputs"):
        before, inputs = inputs, prepare(run=run, inputs=inputs)  # HOOK chain
        if not isinstance(inputs, ModelInputs):
            raise PluginError(
                f"plugin {name!r} returned {type(inputs).__name__} from prepare_inputs; it must "
                "return a ModelInputs (dataclasses.replace makes a changed one)"
            )
        _check_inputs(name, before, inputs)
    return inputs


def _check_inputs(plugin: str, before: ModelInputs, after: ModelInputs) -> None:
    for field in ("x0", "eps", "sigma", "t", "x_t", "target", "loss_weight"):
        was, now = getattr(before, field), getattr(after, field)
        if was is now:
            continue
        if not isinstance(now, Tensor) or (now.shape, now.dtype) != (was.shape, was.dtype):
            found = (
                f"{tuple(now.shape)} {now.dtype}" if isinstance(now, Tensor) else type(now).__name__
            )
            raise PluginError(
                f"plugin {plugin!r}, prepare_inputs: {field} must stay {tuple(was.shape)} "
                f"{was.dtype}; it is {found}"
            )


def loss_terms(host: Host, run: Run, batch: Batch, output: StepOutput) -> list[LossTerm]:
    """Return the loss terms of all plugins, sorted by name, so that their order changes no bit."""
    terms = []
    for name, compute in host.calls("compute_loss"):
        term = compute(run=run, batch=batch, output=output)  # HOOK collected
        if term is not None:
            _check_term(name, term, num_samples=batch.latents.shape[0])
            terms.append(term)
    return sorted(terms, key=lambda term: term.name)


def _check_term(plugin: str, term: object, *, num_samples: int) -> None:
    if not isinstance(term, LossTerm):
        raise PluginError(
            f"plugin {plugin!r} returned {type(term).__name__} from compute_loss; it must return a "
            "LossTerm or None"
        )
    if term.name.split("/")[0] != plugin:
        raise PluginError(
            f"plugin {plugin!r} named a loss term {term.name!r}; the name must be {plugin!r} or begin "
            f"with '{plugin}/'"
        )
    wrong = [
        n for n, v in {"value": term.value, **term.metrics}.items() if not isinstance(v, Tensor)
    ]
    if wrong:
        raise PluginError(
            f"plugin {plugin!r}, loss term {term.name!r}: {wrong[0]} must be a tensor"
        )
    for name, metric in term.metrics.items():
        if metric.numel() != 1:
            raise PluginError(
                f"plugin {plugin!r}, loss term {term.name!r}: the metric {name!r} must be one number; "
                f"it is {tuple(metric.shape)}"
            )
    if tuple(term.value.shape) != (num_samples,) or term.value.dtype != torch.float32:
        raise PluginError(
            f"plugin {plugin!r}, loss term {term.name!r}: the value must be ({num_samples},) float32, "
            f"one number a sample; it is {tuple(term.value.shape)} {term.value.dtype}"
        )
