"""Core's own optimisers, the course of the learning rate, and gradient clipping."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.errors import ConfigError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import ParameterGroup, PluginInfo

if TYPE_CHECKING:
    from trainer_core.run import Run
    from trainer_core.settings.core import OptimizerKeys

COMPENSATED = ("adamw_bf16", "optimi-adamw", "optimi-lion", "optimi-stableadamw")
"""Optimisers that train bfloat16 weights soundly: Kahan summation keeps what rounding drops."""


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return the arguments in text such as ``weight_decay=0.01,betas=(0.9,0.99)``; literals only."""
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("only name=value")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        way_out = 'Write name=value pairs, such as "weight_decay=0.01,betas=(0.9,0.99)".'
        raise ConfigError(
            [Problem("optimizer_config", "is not a list of name=value.", text, way_out=way_out)]
        ) from error


class Optimizers:
    """Core's own plugin: torch AdamW and the optimisers of torch-optimi."""

    info = PluginInfo(summary="Optimisers: torch AdamW and torch-optimi")
    name = "optimizers"

    @hookimpl
    def build_optimizer(
        self, run: Run, groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer | None:
        """Return the optimiser that the settings name, if it is one of core's."""
        name = run.settings.optimizer
        made = _factory(name)
        if made is None:
            return None
        factory, defaults = made
        arguments = {**defaults, **parse_arguments(run.settings.optimizer_config)}
        base = run.settings.learning_rate
        param_groups = [
            {"params": [p for _, p in group.parameters], "lr": group.learning_rate or base}
            for group in groups
        ]
        try:
            optimizer: torch.optim.Optimizer = factory(param_groups, lr=base, **arguments)
        except (TypeError, ValueError) as error:
            problem = Problem(
                "optimizer_config", f"{name} refuses it: {error}.", run.settings.optimizer_config
            )
            raise ConfigError([problem]) from error
        return optimizer


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


def clip_gradients(parameters: Iterable[nn.Parameter], *, limit: float, method: str) -> Tensor:
    """Clip in place; return the norm (method norm) or the largest magnitude (value) before it.

    A 0-d tensor on the device; nothing synchronises the host. ``limit`` 0 only measures.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    if method == "norm":
        return nn.utils.clip_grad_norm_(with_grad, limit or math.inf)
    grads = [p.grad for p in with_grad if p.grad is not None]
    largest = torch.stack(torch._foreach_norm(grads, math.inf)).max()
    if limit:
        nn.utils.clip_grad_value_(with_grad, limit)
    return largest
