"""The whole loop: set-up, one optimiser step, training. Read it from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer_core import persistence, rng, validation
from trainer_core.blocks import arrange, compose_routes, draw_plan
from trainer_core.capabilities import Blocks
from trainer_core.data import CachedData, Loader
from trainer_core.errors import PluginError
from trainer_core.flow import SigmaSampler, draw_inputs
from trainer_core.metrics import Meter
from trainer_core.optim import clip_gradients, learning_rate, update
from trainer_core.phases import phase, residency
from trainer_core.plugins import Host
from trainer_core.progress import Display
from trainer_core.reach import backward
from trainer_core.reporting import Reporter
from trainer_core.run import Run
from trainer_core.training import (
    Training,
    averaged,
    checked_model,
    loss_terms,
    num_tokens,
    parameter_groups,
    prepared,
    spatial_tokens,
)  # fmt: skip
from trainer_core.types import Batch, ForwardPlan, ModelInputs, Route, StepOutput


def setup(
    run: Run, host: Host, data: CachedData, *, display: Display, start: persistence.Start
) -> Training:
    """Load the model, let plugins attach, compose what acts inside the forward, resume."""
    model = host.hooks.load_model(run=run)  # HOOK first result, wrapped
    run.model = checked_model(model, host)
    for plugin in host.plugins.values():
        if (attach := getattr(plugin, "attach", None)) is not None:
            attach(run)
    groups = parameter_groups(run, host)
    routes = inside_the_forward(run, host)
    optimizer = host.hooks.build_optimizer(run=run, groups=groups)  # HOOK first result
    assert optimizer is not None  # core's own answer last, with an error
    loader = Loader(data, run, start_step=start.step)
    training = Training(
        run=run, host=host, display=display, events=start.events, trackers=start.trackers,
        meter=Meter(), groups=groups, routes=routes, optimizer=optimizer, ema=averaged(run),
        sampler=SigmaSampler(run.settings, run.spec.experts), loader=loader, run_id=start.run_id,
        eval_batches=loader.eval_batches(run.settings.num_eval_images),
        total_steps=persistence.total_steps(run.settings, loader.batches_per_epoch),
        data_digest=data.plan.digest, identity=start.identity, saved_step=start.step, step=start.step,
    )  # fmt: skip
    persistence.restore(training, start.checkpoint)
    return training


def inside_the_forward(run: Run, host: Host) -> Sequence[Route]:
    """Compose routes and residency into the model's stacks of blocks; return the routes in order."""
    found = host.hooks.route_tokens(run=run)  # HOOK collected
    flat = [r for item in found for r in (item if isinstance(item, Sequence) else [item])]
    moves = residency(host, run)
    if not isinstance(run.model, Blocks):
        if flat or moves:
            raise PluginError("a plugin routes tokens or moves blocks, but the model has no Blocks")
        return ()
    for role, stack in run.model.stacks().items():
        arrange(stack, run.settings, residency=moves.get(role, moves.get(None)))
    return compose_routes(flat, min(len(stack) for stack in run.model.stacks().values()))


def predict(training: Training, inputs: ModelInputs) -> tuple[Tensor, Mapping[int, Any]]:
    """Run the training forward with the routes drawn for this micro-step and the requested taps."""
    run, plan = training.run, ForwardPlan()
    if training.routes or run.taps:
        num_samples, tokens = inputs.x_t.shape[0], num_tokens(training, inputs.x_t)
        taps = tuple(sorted(run.taps))
        plan = draw_plan(training.routes, taps, num_samples, tokens // num_samples, inputs.moment)
    return run.model.predict(inputs, plan)


def train_step(training: Training, batches: Sequence[Batch]) -> dict[str, Any]:
    """Do one optimiser step. Returns scalars on the device; nothing here synchronises the host."""
    run, host, settings = training.run, training.host, training.run.settings
    share, step, scalars = 1 / len(batches), training.step + 1, dict[str, Any]()
    for batch in batches:
        run.moment = at = batch.moment
        rng.seed_global(run.seed, at.step, at.micro, at.rank, device=run.device)
        inputs = draw_inputs(run, batch, training.sampler, spatial_tokens(training, batch.latents))
        inputs = prepared(host, run, inputs)
        with phase(host, run, "forward"):
            prediction, taps = predict(training, inputs)
            terms = loss_terms(host, run, batch, StepOutput(prediction, inputs, taps))
            loss = torch.stack([term.value for term in terms]).sum(0).mean()
        with phase(host, run, "backward"):
            backward(training, loss, share, role=inputs.role)
        summed = {"loss": loss}
        for term in terms:
            summed |= {term.name: term.value.detach().mean(), **term.metrics}
        for name, value in summed.items():
            part = value.detach() * share
            scalars[name] = scalars[name] + part if name in scalars else part
    with phase(host, run, "update"):
        scalars["grad_norm"] = clip_gradients(
            training.parameters, limit=settings.max_grad_norm, method=settings.grad_clip_method
        )
        for group, made in zip(training.optimizer.param_groups, training.groups, strict=True):
            base = made.learning_rate or settings.learning_rate
            rate = learning_rate(step, settings=settings, base=base, total=training.total_steps)
            group["lr"] = rate
        scalars["lr"] = training.optimizer.param_groups[0]["lr"]
        update(training.optimizer)
        if training.ema is not None:
            training.ema.update(step)
        training.optimizer.zero_grad(set_to_none=True)
    training.step = step
    return scalars


def train(training: Training) -> None:
    """Train to the last step, or until a signal asks for an end; a checkpoint is written either way."""
    run, settings, reporter = training.run, training.run.settings, Reporter(training)
    validation.duties(training)
    for network in run.model.networks.values():
        network.train()
    every, total = settings.log_step_interval, training.total_steps
    batches = iter(training.loader)
    with training.display.task("step", total, start=training.step, every=every) as advance:
        while training.step < total and training.stop is None:
            reporter.start_step()
            group = next(batches)
            scalars = train_step(training, group)
            ends = training.step == total or training.stop is not None
            due = ends or validation.is_due(settings.checkpoint_step_interval, training.step)
            flush = due or validation.renders(training) or validation.measures(training)
            advance(1, reporter.end_step(group, scalars, flush=flush))
            if due:
                persistence.save(training)
            if training.stop is None:
                validation.duties(training)
    if training.stop is None:
        persistence.finish(training)
    elif training.step > training.saved_step:  # the signal came after the step, in validation
        persistence.save(training)
