"""Frozen linear layers, with low-rank adapters or without, in as few passes as there can be.

``x W^T + b + scale x A^T B^T`` is one product that a second, thin one is added to in place: the adapter's
output is never written on its own, scaled, or added in a pass of its own, and the same holds for the
gradient of x. Layers that read the same tokens (query, key, value) share the thin products that read x,
and their gradients of x are summed inside the products. The weights stay in their layers; nothing is
stored twice.

A layer with an adapter says what it computes through a method ``affine()``; a frozen
:class:`torch.nn.Linear` needs none. Layers that compute anything else, or that somebody listens to, are
called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

RESIDENT = "resident"
"""Attribute of a layer whose weights come and go: in ``with layer.resident():`` they are there.

Who moves weights with hooks on single layers sets it, on the layer and on the wrapper that its hooks
hang on, so that they can be computed without a call. Its hooks have the attribute :data:`MOVES`.
"""
MOVES = "moves_weights"
"""Attribute of hooks that ``resident`` stands for; a layer with any other is called."""

WEIGHT_ONLY = "weight_only"
"""Attribute of a layer that stores its weight in fewer bits and rounds nothing else."""


@dataclass(frozen=True)
class Affine:
    """What a layer computes: ``base(x) + scale x down^T up^T``, or ``base(x)`` without an adapter.

    base: the layer without its adapter; a frozen, plain ``nn.Linear``, or anything of its outputs, such
    as a quantised layer. down: (r, in). up: (out, r).
    """

    base: nn.Module
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def listened(module: nn.Module) -> bool:
    """Return whether hooks hang on a module that only a call of the module runs."""
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(not getattr(hook, MOVES, False) for hooks in kinds for hook in hooks.values())


def untouched(module: nn.Module, kind: type) -> bool:
    """Return whether a module computes what its class says, and nobody listens to it."""
    return type(module) is kind and "forward" not in vars(module) and not listened(module)


def apply(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Return each layer's output (..., out) for the same x (..., in).

    In one go where every layer is affine; with one call after the other elsewhere, and under a
    compiler, which fuses by itself.
    """
    if not torch.compiler.is_compiling():
        found = [affine_of(layer) for layer in layers]
        affines = [a for a in found if a is not None]
        outs = compute(affines, x) if len(affines) == len(found) else None
        if outs is not None:
            return outs
    return tuple(layer(x) for layer in layers)


def affine_of(layer: nn.Module) -> Affine | None:
    """Return what a layer computes, None where it has to be called."""
    if own := getattr(layer, "affine", None):
        return None if listened(layer) else cast("Affine | None", own())
    return Affine(layer) if _plain(layer) or WEIGHT_ONLY in vars(layer) else None


def _plain(layer: nn.Module) -> bool:
    """Whether it is a frozen ``nn.Linear`` that may be computed without a call."""
    return untouched(layer, nn.Linear) and _frozen(layer)


def readable(layer: nn.Module, *, like: Tensor) -> Affine | None:
    """Return what a layer computes if the weight of its base can be had at any time by :func:`restored`.

    A plain base has the dtype of ``like``; a stored one rounds its weight and nothing else.
    """
    own = affine_of(layer) if RESIDENT not in vars(layer) else None
    if own is None or RESIDENT in vars(own.base) or not untouched(own.base, type(own.base)):
        return None
    parts = [t for t in (own.base.weight, own.base.bias) if t is not None]
    if any(t.requires_grad or t.device != like.device for t in parts):
        return None
    if WEIGHT_ONLY in vars(own.base):
        return own
    return own if _plain(own.base) and all(t.dtype == like.dtype for t in parts) else None


def restored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that products see: of a stored one a dense copy."""
    is_stored = is_traceable_wrapper_subclass(weight)
    return (weight.dequantize() if is_stored else weight).to(dtype)


def _frozen(layer: Any) -> bool:
    own = [t for t in (layer.weight, layer.bias) if t is not None]
    return all(not t.requires_grad and _dense(t) for t in own)


def _dense(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def compute(affines: Sequence[Affine], x: Tensor) -> tuple[Tensor, ...] | None:
    """Return the outputs (..., out) for x (..., in); None where dtypes or devices are not alike.

    Products are computed in autocast's dtype, which adapters are cast to, or in that of x, which
    adapters must have.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
    adapters = [t for a in affines for t in (a.down, a.up) if t is not None]
    if any(t.device != x.device or not (casts or t.dtype == dtype) for t in adapters):
        return None
    resident = [vars(a.base)[RESIDENT] for a in affines if RESIDENT in vars(a.base)]
    plain = all(_plain(a.base) for a in affines) and all(t.dtype == dtype for t in _own(affines))
    if not plain:
        moved = len(affines) > 1 and bool(resident)  # those layers see to themselves when called
        if moved or not adapters or any(listened(a.base) for a in affines):
            return None
    with ExitStack() as stack:
        for there in resident:
            stack.enter_context(there())
        if plain:
            here = all(t.device == x.device for t in _own(affines))
            return _joint(affines, x, dtype) if here else None
        outs = [a.base(x) for a in affines]
        if any(t.dtype != dtype or not t.is_contiguous() for t in outs):
            return None
        # autograd takes no view of a tensor to be changed in place
        return _added(affines, x, [t.clone() if t._is_view() else t for t in outs], dtype)


def _own(affines: Sequence[Affine]) -> list[Tensor]:
    """Return the weights and biases of plain bases."""
    bases: list[Any] = [a.base for a in affines]
    return [t for base in bases for t in (base.weight, base.bias) if t is not None]


def _joint(affines: Sequence[Affine], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    parts = [t for a in affines for t in (a.base.weight, a.base.bias, a.down, a.up)]
    scales = tuple(a.scale for a in affines)
    outs: tuple[Tensor, ...] = _Joint.apply(x, dtype, scales, *parts)  # type: ignore[no-untyped-call]
    return outs


def _added(
    affines: Sequence[Affine], x: Tensor, outs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Add the adapters to the outputs of their bases, in place."""
    done = list(outs)
    having = [i for i, a in enumerate(affines) if a.down is not None]
    flat = [t for i in having for t in (outs[i], affines[i].down, affines[i].up)]
    scales = tuple(affines[i].scale for i in having)
    for i, out in zip(having, _Added.apply(x, dtype, scales, *flat), strict=True):  # type: ignore[no-untyped-call]
        done[i] = out
    return tuple(done)


class _Joint(torch.autograd.Function):
    """parts: weight, bias, down, up of each layer, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, scales: tuple[float, ...], *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _grouped(parts, 4)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])  # (T, in)
            thin = _thin([down for _, _, down, _ in layers], rows)
            outs = []
            for (weight, bias, _, up), hidden, scale in zip(layers, thin, scales, strict=True):
                out = F.linear(rows, weight, bias)
                if hidden is not None:
                    torch.addmm(out, hidden, up.to(dtype).t(), alpha=scale, out=out)
                outs.append(out.view(*x.shape[:-1], out.shape[-1]))
        trains = any(hidden is not None for hidden in thin)
        needed = ctx.needs_input_grad[0]
        kept = [(weight if needed else None, down, up) for weight, _, down, up in layers]
        ctx.save_for_backward(rows if trains else None, *thin, *(t for k in kept for t in k))
        ctx.scales, ctx.dtype, ctx.shape, ctx.x_dtype = scales, dtype, x.shape, x.dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        thin, layers = rest[:count], _grouped(rest[count:], 3)
        with torch.autocast(grads[0].device.type, enabled=False):
            flat = [g.to(ctx.dtype).reshape(-1, g.shape[-1]) for g in grads]  # (T, out)
            of_x = None
            if ctx.needs_input_grad[0]:
                for grad, (weight, *_) in zip(flat, layers, strict=True):
                    of_x = _plus(of_x, grad, weight)
            adapters = [(down, up) for _, down, up in layers]
            of_x, of_factors = _backward(adapters, ctx.scales, thin, rows, flat, of_x)
            if of_x is not None:
                of_x = of_x.view(ctx.shape).to(ctx.x_dtype)
        return of_x, None, None, *(t for pair in of_factors for t in (None, None, *pair))


class _Added(torch.autograd.Function):
    """parts: output of the base, down, up of each layer, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, scales: tuple[float, ...], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        layers = _grouped(parts, 3)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            thin = _thin([down for _, down, _ in layers], rows)
            for (out, _, up), hidden, scale in zip(layers, thin, scales, strict=True):
                into = out.view(-1, out.shape[-1])
                torch.addmm(into, cast(Tensor, hidden), up.to(dtype).t(), alpha=scale, out=into)
        outs = [out for out, _, _ in layers]
        ctx.mark_dirty(*outs)
        ctx.save_for_backward(rows, *thin, *(t for _, down, up in layers for t in (down, up)))
        ctx.scales, ctx.dtype, ctx.shape, ctx.x_dtype = scales, dtype, x.shape, x.dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        thin, adapters = rest[:count], _grouped(rest[count:], 2)
        with torch.autocast(grads[0].device.type, enabled=False):
            flat = [g.to(ctx.dtype).reshape(-1, g.shape[-1]) for g in grads]
            needed = ctx.needs_input_grad[0]
            of_x, of_factors = _backward(
                adapters, ctx.scales, thin, rows, flat, None, of_x_too=needed
            )
            if of_x is not None:
                of_x = of_x.view(ctx.shape).to(ctx.x_dtype)
        own = zip(grads, of_factors, strict=True)
        return of_x, None, None, *(t for grad, pair in own for t in (grad, *pair))


def _grouped(parts: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    return [tuple(parts[i : i + size]) for i in range(0, len(parts), size)]


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a b``, in place."""
    return a @ b if total is None else torch.addmm(total, a, b, out=total)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _thin(downs: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """Return ``rows down^T`` (T, r) for each factor from one product; None for each that is None."""
    there = [down.to(rows.dtype) for down in downs if down is not None]
    if not there:
        return [None] * len(downs)
    both = rows @ _joined(there, 0).t()
    split = iter(torch.split(both, [down.shape[0] for down in there], dim=1))
    return [None if down is None else next(split) for down in downs]


def _backward(
    adapters: Sequence[tuple[Tensor | None, Tensor | None]],
    scales: Sequence[float],
    thin: Sequence[Tensor | None],
    rows: Tensor | None,
    grads: Sequence[Tensor],
    of_x: Tensor | None,
    *,
    of_x_too: bool = False,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Return the gradient of x, to which the adapters' share is added, and those of down and up.

    of_x: what the bases give, None where x needs none or, with ``of_x_too``, where it comes elsewhere.
    """
    found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(adapters)
    having = [i for i, (down, _) in enumerate(adapters) if down is not None]
    if not having or rows is None:
        return of_x, found
    dtype = rows.dtype
    of_thin = []
    of_up = {}
    for i in having:
        up, hidden = cast(Tensor, adapters[i][1]), cast(Tensor, thin[i])
        of_thin.append(grads[i] @ (up * scales[i]).to(dtype))  # (T, r)
        of_up[i] = (grads[i].t() @ hidden).to(up.dtype).mul_(scales[i])
    joined = _joined(of_thin, 1)
    downs = [cast(Tensor, adapters[i][0]) for i in having]
    if of_x is not None or of_x_too:
        of_x = _plus(of_x, joined, _joined([down.to(dtype) for down in downs], 0))
    of_down = torch.split(joined.t() @ rows, [down.shape[0] for down in downs], dim=0)
    for i, down, grad in zip(having, downs, of_down, strict=True):
        found[i] = (grad.to(down.dtype), of_up[i])
    return of_x, found
