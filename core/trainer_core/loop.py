"""The whole loop: set-up, one optimiser step, training. Read it from top to bottom."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer_core import persistence, validation
from trainer_core.blocks import Route, compose_routes, draw_plan
from trainer_core.capabilities import Blocks, TokenGrid
from trainer_core.data import CachedData, Loader
from trainer_core.ema import Ema
from trainer_core.errors import PluginError
from trainer_core.flow import SigmaSampler, draw_inputs
from trainer_core.metrics import EventLog, Meter, Trackers
from trainer_core.optim import clip_gradients, learning_rate
from trainer_core.phases import phase, residency
from trainer_core.plugins import Host
from trainer_core.progress import Display
from trainer_core.run import Run
from trainer_core.trained import check_capabilities, trained_groups, trained_parameters
from trainer_core.types import Batch, ForwardPlan, ModelInputs, ParameterGroup, Record


@dataclass
class Training:
    """All that the loop works on. ``stop``: the signal that asked for an end, if any."""

    run: Run
    host: Host
    display: Display
    events: EventLog
    trackers: Trackers
    groups: Sequence[ParameterGroup]
    routes: Sequence[Route]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    sampler: SigmaSampler
    loader: Loader
    eval_batches: Mapping[str, Sequence[Batch]]
    total_steps: int
    run_id: str
    step: int = 0
    stop: signal.Signals | None = None


def setup(
    run: Run, host: Host, data: CachedData, *, display: Display, start: persistence.Start
) -> Training:
    """Load the model, let plugins attach, compose what acts inside the forward, resume."""
    run.model = host.hooks.load_model(run=run)  # HOOK first result, wrapped
    check_capabilities(run, host)
    for plugin in host.plugins.values():
        if (attach := getattr(plugin, "attach", None)) is not None:
            attach(run)
    groups = trained_groups(run, host)
    routes = host.hooks.route_tokens(run=run)  # HOOK collected
    moves = residency(host, run)
    composed: Sequence[Route] = []
    if isinstance(run.model, Blocks):
        for stack in run.model.stacks().values():
            composed = compose_routes(routes, len(stack.blocks))
            stack.residency = moves
    elif routes or moves:
        raise PluginError("a route or residency was given, but the model is not a stack of blocks")
    optimizer = host.hooks.build_optimizer(run=run, groups=groups)  # HOOK first result
    if optimizer is None:
        raise PluginError(f"no plugin builds the optimizer {run.settings.optimizer!r}")
    settings = run.settings
    ema = None
    if settings.use_ema:
        averaged = trained_parameters(run)
        ema = Ema(averaged, decay=settings.ema_decay, interval=settings.ema_update_interval)
    training = Training(
        run=run, host=host, display=display, events=start.events, trackers=start.trackers,
        groups=groups, routes=composed, optimizer=optimizer, ema=ema,
        sampler=SigmaSampler(settings, run.spec.experts),
        loader=(loader := Loader(data, run, start_step=start.step)),
        eval_batches=loader.eval_batches(settings.num_eval_images),
        total_steps=start.total_steps, run_id=start.run_id,
    )  # fmt: skip
    if start.checkpoint is not None:
        persistence.restore(training, start.checkpoint)
    return training


def predict(training: Training, inputs: ModelInputs) -> tuple[Tensor, Mapping[int, Any]]:
    """Run the training forward with the routes drawn for this micro-step and the requested taps."""
    run, plan = training.run, ForwardPlan()
    if isinstance(run.model, TokenGrid) and (training.routes or run.taps):
        frames, rows, columns = run.model.token_grid(tuple(inputs.x_t.shape))
        num_samples, num_tokens = inputs.x_t.shape[0], frames * rows * columns
        taps = tuple(sorted(run.taps))
        plan = draw_plan(training.routes, taps, num_samples, num_tokens, inputs.moment)
    return run.model.predict(inputs, plan)


def train_step(training: Training, batches: Sequence[Batch]) -> dict[str, Any]:
    """Do one optimiser step. Returns scalars on the device; nothing here synchronises the host."""
    run, host, settings = training.run, training.host, training.run.settings
    scalars: dict[str, Any] = {"loss": 0.0}
    share = 1 / len(batches)
    for batch in batches:
        run.moment = batch.moment
        inputs = draw_inputs(run, batch, training.sampler, persistence.spatial_tokens(run, batch))
        for _, prepare in host.calls("prepare_inputs"):
            inputs = prepare(run=run, inputs=inputs)  # HOOK chain
        with phase(host, run, "forward"):
            prediction, taps = predict(training, inputs)
            output = host.output(prediction=prediction, inputs=inputs, taps=taps)
            terms = host.loss_terms(run=run, batch=batch, output=output)  # HOOK summed by name
        loss = torch.stack([term.value for term in terms]).sum(0).mean()
        with phase(host, run, "backward"):
            (loss * share).backward()  # type: ignore[no-untyped-call]
        scalars["loss"] = scalars["loss"] + loss.detach() * share
        for term in terms:
            for name, value in {term.name: term.value.mean(), **term.metrics}.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach() * share
    with phase(host, run, "update"):
        parameters = [p for group in training.groups for _, p in group.parameters]
        scalars["grad_norm"] = clip_gradients(
            parameters, limit=settings.max_grad_norm, method=settings.grad_clip_method
        )
        step = training.step + 1
        for group, made in zip(training.optimizer.param_groups, training.groups, strict=True):
            base = made.learning_rate or settings.learning_rate
            group["lr"] = learning_rate(
                step, settings=settings, base=base, total=training.total_steps
            )
        scalars["lr"] = training.optimizer.param_groups[0]["lr"]
        training.optimizer.step()
        if training.ema is not None:
            training.ema.update(step)
        training.optimizer.zero_grad(set_to_none=True)
    return scalars
