"""Core's own optimisers, the course of the learning rate, and gradient clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.catalogue import did_you_mean
from trainer_core.errors import ConfigError, PluginError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.settings.arguments import parse_arguments
from trainer_core.types import ParameterGroup, PluginInfo

if TYPE_CHECKING:
    from trainer_core.run import Run
    from trainer_core.settings.core import OptimizerKeys

COMPENSATED = ("adamw_bf16", "optimi-adamw", "optimi-lion", "optimi-stableadamw")
"""Optimisers that train bfloat16 weights soundly: Kahan summation keeps what rounding drops."""


class Optimizers:
    """Core's own plugin: torch AdamW and the optimisers of torch-optimi."""

    info = PluginInfo(summary="Optimisers: torch AdamW and torch-optimi")
    name = "optimizers"

    @hookimpl
    def build_optimizer(self, run: Run, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """Return the optimiser that the settings name; core is asked last and refuses unknown ones."""
        optimizer = _build(run.settings, param_groups(run.settings, groups))
        if optimizer is None:
            raise PluginError(
                f"no plugin of this run built the optimizer {run.settings.optimizer!r}"
            )
        return optimizer


def check_arguments(settings: OptimizerKeys) -> None:
    """Raise ConfigError where one of core's optimisers refuses ``optimizer_config``: before any work."""
    _build(settings, nothing())


def nothing() -> list[dict[str, Any]]:
    """Return param groups of one weight, to try an optimiser's arguments on."""
    return [{"params": [nn.Parameter(torch.zeros(1))]}]


def param_groups(settings: OptimizerKeys, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Return what an optimiser's constructor takes for the groups, in their order."""
    base = settings.learning_rate
    return [
        {"params": [p for _, p in group.parameters], "lr": group.learning_rate or base}
        for group in groups
    ]


def _build(
    settings: OptimizerKeys, param_groups: Sequence[dict[str, Any]]
) -> torch.optim.Optimizer | None:
    made = _factory(settings.optimizer)
    if made is None:
        return None
    factory, defaults = made
    return construct(factory, param_groups, settings=settings, defaults=defaults)


def construct(
    factory: Any,
    param_groups: Sequence[dict[str, Any]],
    *,
    settings: OptimizerKeys,
    defaults: Mapping[str, Any],
    fixed: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """Return ``factory(param_groups, lr=..., **arguments)``; for plugins that bring optimisers.

    arguments: ``optimizer_config`` over ``defaults``. fixed: arguments that are nobody's to give.
    ConfigError that names ``optimizer_config`` where the optimiser has no such argument or refuses it.
    """
    name, text = settings.optimizer, settings.optimizer_config
    given = parse_arguments(text)
    _check_names(name, factory, given, text, fixed=("params", "lr", *fixed))
    try:
        optimizer: torch.optim.Optimizer = factory(
            param_groups, lr=settings.learning_rate, **{**defaults, **given}
        )
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        way_out = "Correct that argument, or remove the key."
        problem = Problem("optimizer_config", f"{name} refuses it: {reason}.", text, "", way_out)
        raise ConfigError([problem]) from error
    return optimizer


def _check_names(
    name: str, factory: Any, given: Iterable[str], text: str | None, *, fixed: Sequence[str]
) -> None:
    takes = [word for word in inspect.signature(factory).parameters if word not in fixed]
    for word in given:
        if word not in takes:
            known = f"It takes {', '.join(takes)}."
            way_out = "Set learning_rate instead." if word == "lr" else known
            reason = f"{name} takes no {word} here{did_you_mean(word, takes) or '.'}"
            raise ConfigError([Problem("optimizer_config", reason, text, "", way_out)])


def _factory(name: str) -> tuple[Any, dict[str, Any]] | None:
    if name == "adamw":
        return torch.optim.AdamW, {"weight_decay": 1e-2}
    import optimi

    decay = {"weight_decay": 1e-2}
    table: dict[str, tuple[Any, dict[str, Any]]] = {
        "adamw_bf16": (optimi.AdamW, {**decay, "betas": (0.9, 0.999), "kahan_sum": True}),
        "optimi-adamw": (optimi.AdamW, {**decay, "betas": (0.9, 0.999)}),
        "optimi-lion": (optimi.Lion, {"betas": (0.9, 0.99)}),
        "optimi-stableadamw": (optimi.StableAdamW, decay),
    }
    return table.get(name)


def trained_dtype(optimizer: str, *, model_type: str, mixed_precision: str) -> torch.dtype:
    """Return the dtype of trained weights.

    float32, but bfloat16 where the optimiser is made for it (``adamw_bf16``), and for full fine-tunes
    in bf16 with an optimiser that compensates rounding.
    """
    if mixed_precision == "no":
        if optimizer == "adamw_bf16":
            way_out = "Set mixed_precision to bf16, or optimizer to adamw."
            text = "trains bfloat16 weights, but mixed_precision is no."
            raise ConfigError([Problem("optimizer", text, optimizer, way_out=way_out)])
        return torch.float32
    full = model_type == "full" and optimizer in COMPENSATED
    return torch.bfloat16 if full or optimizer == "adamw_bf16" else torch.float32


def learning_rate(step: int, *, settings: OptimizerKeys, base: float, total: int) -> float:
    """Return the learning rate of optimiser step ``step`` (from 1) of ``total``.

    Warm-up rises linearly to ``base`` at step ``lr_warmup_steps``; then the schedule runs over what is
    left. ``lr_end`` scales with ``base / learning_rate``, so that groups keep their ratio.
    """
    name, warmup = settings.lr_scheduler, settings.lr_warmup_steps
    if name == "constant":
        return base
    if step <= warmup:
        return base * step / warmup
    progress = min(1.0, (step - 1 - warmup) / max(1, total - warmup))
    end = settings.lr_end * base / settings.learning_rate
    if name == "linear":
        return end + (base - end) * (1 - progress)
    if name == "cosine":
        return end + (base - end) * (1 + math.cos(math.pi * progress)) / 2
    if name == "cosine_with_restarts":
        within = settings.lr_num_cycles * progress % 1.0 if progress < 1 else 1.0
        return end + (base - end) * (1 + math.cos(math.pi * within)) / 2
    if name == "polynomial":
        return end + (base - end) * math.pow(1 - progress, settings.lr_power)
    return base


def schedule_sentence(settings: OptimizerKeys, total: int) -> str | None:
    """Return what a warm-up at or above the run's length does, or None if there is nothing odd."""
    warmup = settings.lr_warmup_steps
    if settings.lr_scheduler == "constant" and warmup:
        return f"lr_warmup_steps {warmup} has no effect: lr_scheduler is constant."
    if warmup < total or not warmup:
        return None
    last = learning_rate(total, settings=settings, base=settings.learning_rate, total=total)
    return (
        f"lr_warmup_steps {warmup} is not below the run's {total} steps: the learning rate rises "
        f"during the whole run, to {last:.3g} at its last step, and lr_scheduler "
        f"{settings.lr_scheduler} never begins."
    )


def update(optimizer: torch.optim.Optimizer) -> None:
    """Do one step; a group without any gradient stays as it is, its step counter included.

    Without gradient is the expert that no micro-batch of the step was drawn for. Optimisers pass over
    its parameters, but those of torch-optimi count a step of the group all the same, and correct the bias
    of its moments as if it had been taken.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [g for g in groups if any(p.grad is not None for p in g["params"])]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def clip_gradients(parameters: Iterable[nn.Parameter], *, limit: float, method: str) -> Tensor:
    """Clip in place; return the norm (method norm) or the largest magnitude (value) before it.

    A 0-d tensor on the device; nothing synchronises the host. ``limit`` 0 only measures.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    grads = [p.grad for p in with_grad if p.grad is not None]
    order = 2.0 if method == "norm" else math.inf
    # in float32, whatever the gradients are: a norm in bfloat16 has three digits
    norms = torch._foreach_norm(grads, order, dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.to(norms[0].device) for n in norms]), order
    )
    if limit and method == "norm":
        torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))
    elif limit:
        nn.utils.clip_grad_value_(with_grad, limit)
    return total
