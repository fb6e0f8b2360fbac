"""Elementwise work of a block, each in as few passes over the tokens as PyTorch's own operators allow.

Mathematics only, on any device, with gradients. In bfloat16 everything is computed in float32 and rounded
once, as diffusers does, but the float32 intermediates are not written out where an operator can take
bfloat16 tokens beside float32 coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer_core.linear import Affine, restored

LOW = (torch.bfloat16, torch.float16)


def exact(like: Tensor) -> Any:
    """Return a context in which autocast leaves the dtypes of what is computed alone."""
    return torch.autocast(like.device.type, enabled=False)


def writes_narrow(device: torch.device) -> bool:
    """Whether an elementwise operator casts in registers when its ``out`` is narrower than its inputs.

    On the CPU it makes float32 copies behind the scenes, so an explicit cast costs no more there.
    """
    return device.type == "cuda" and not torch.compiler.is_compiling()


def mixes(device: torch.device) -> bool:
    """Whether norms take float32 weights beside bfloat16 tokens: the CPU's kernel of layer norm does.

    The CPU has no kernel of RMS norm, which other devices have, so it is also where ours gains.
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Return ``(x - mean) / std * weight + bias`` over the last dimension, in x's dtype, rounded once.

    x: (..., D). weight, bias: (D,), float32 or x's dtype.
    """
    shape = (x.shape[-1],)
    if mixes(x.device) or x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.layer_norm(x.float(), shape, weight.float(), bias.float(), eps).to(x.dtype)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """Return ``norm(x) * scale + shift`` in x's dtype, norm without weights.

    x: (B, N, D). scale, shift: (B, D), or (B, N, D) float32. One coefficient for all tokens of a sample
    is the weight of a layer norm, so that norm and modulation are one pass over each sample.
    """
    with exact(x):
        if scale.ndim == 2 and torch.compiler.is_compiling():  # it is fused then, whatever its form
            scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
        if scale.ndim == 3:
            wide = F.layer_norm(x.to(scale.dtype), (x.shape[-1],), eps=eps)
            return torch.addcmul(shift, wide, scale).to(x.dtype)
        if x.shape[0] == 1:
            return layer_norm(x, scale.squeeze(0), shift.squeeze(0), eps=eps)
        samples = zip(x.unbind(0), scale.unbind(0), shift.unbind(0), strict=True)
        return torch.stack([layer_norm(rows, a, b, eps=eps) for rows, a, b in samples])


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + y * gate`` in x's dtype, rounded once.

    x, y: (B, N, D). gate: (B, D) or (B, N, D) float32. Keeps y for the backward only where the gate has a
    gradient.
    """
    gate = gate.unsqueeze(1) if gate.ndim == 2 else gate
    out: Tensor = _GatedAdd.apply(x, y, gate)  # type: ignore[no-untyped-call] # torch's own
    return out


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)
        ctx.dtype = y.dtype
        with exact(x):
            return _gated(x, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, gate = ctx.saved_tensors
        of_y = of_gate = None
        with exact(grad):
            if ctx.needs_input_grad[1]:
                of_y = _times(grad, gate, ctx.dtype)
            if y is not None:
                of_gate = _summed_to(grad.to(gate.dtype) * y, gate.shape)
        return grad, of_y, of_gate


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + y * gate`` in x's dtype."""
    if writes_narrow(x.device):
        return torch.addcmul(x, y, gate, out=torch.empty_like(x))
    return torch.addcmul(x, y, gate).to(x.dtype)


def _times(grad: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad * gate`` as ``dtype``."""
    if writes_narrow(grad.device):
        return torch.mul(grad, gate, out=torch.empty_like(grad, dtype=dtype))
    return (grad * gate).to(dtype)


def _summed_to(full: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum of ``full`` over the dimensions in which ``shape`` is 1."""
    over = [i for i, (a, b) in enumerate(zip(full.shape, shape, strict=True)) if a != b]
    return full.sum(over, keepdim=True) if over else full


Turn = tuple[Tensor, Tensor]
"""Cosine and sine of each pair of channels' turn, (1 or B, N, 1, d / 2)."""


def turns(cos: Tensor, sin: Tensor) -> Turn:
    """Return views of diffusers' tables (1 or B, N, 1, d), in which each value stands twice in a row."""
    return cos[..., 0::2], sin[..., 1::2]


def _product(turn: Turn) -> Tensor:
    """Return the turns as complex numbers, so that a turn is one product; made where it is used."""
    cos, sin = (t.float() if t.dtype in LOW else t for t in turn)
    return torch.complex(cos, sin)


def rotate(x: Tensor, turn: Turn, *, dtype: torch.dtype) -> Tensor:
    """Return x with each pair of neighbouring channels turned (RoPE), as ``dtype``.

    x: (B, N, H, d). Keeps nothing but ``turn`` for the backward, which turns back. Compilers fuse real
    numbers only, and get those.
    """
    if torch.compiler.is_compiling():
        cos, sin = (t.float() if t.dtype in LOW else t for t in turn)
        x1, x2 = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1)
        return turned.flatten(-2).to(dtype)
    out: Tensor = _Rotate.apply(x, *turn, dtype)  # type: ignore[no-untyped-call] # torch's own
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, _product((cos, sin)), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _product(ctx.saved_tensors).conj()
        return _turned(grad, back, ctx.dtype), None, None, None


def _turned(x: Tensor, turn: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x * turn`` of pairs of channels as complex numbers, (B, N, H, d) in ``dtype``."""
    with exact(x):
        if x.dtype in LOW:
            wide = x.float()
            _pairs(wide).mul_(turn)
            return wide.to(dtype)
        return torch.view_as_real(_pairs(x.contiguous()) * turn).flatten(-2).to(dtype)


def head_norm(
    x: Tensor, weight: Tensor, *, eps: float, heads: int, turn: Turn | None, dtype: torch.dtype
) -> Tensor:
    """Return heads (B, N, H, d) of x after an RMS norm over all of them, turned where ``turn`` is given.

    x: (B, N, H * d). weight: (H * d,). turn: as in :func:`rotate`. dtype: of the result.
    """
    if not mixes(x.device):
        with exact(x):
            normed = F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
        normed = normed.unflatten(-1, (heads, -1))
        return normed.to(dtype) if turn is None else rotate(normed, turn, dtype=dtype)
    cos, sin = turn or (None, None)
    out: Tensor = _HeadNorm.apply(x, weight, cos, sin, eps, heads, dtype)  # type: ignore[no-untyped-call]
    return out


class _HeadNorm(torch.autograd.Function):
    """Norm and turn rounded once; what is kept are x and one number a token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float,
        heads: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        with exact(x):
            wide = torch.float32 if x.dtype in LOW else x.dtype
            weight = weight.to(wide)
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            rms = torch.addcmul(length.new_full((), eps), length, length, value=1 / x.shape[-1])
            scale = rms.rsqrt_()  # (B, N, 1)
            ctx.save_for_backward(x, weight, cos, sin, scale)
            out = (x * weight).unflatten(-1, (heads, -1))  # (B, N, H, d)
            if cos is None or sin is None:
                out = out.mul_(scale.unsqueeze(-1))
            else:
                _pairs(out).mul_(_product((cos, sin)) * scale.unsqueeze(-1))
            return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, scale = ctx.saved_tensors
        with exact(grad):
            if cos is not None:
                grad = _turned(grad, _product((cos, sin)).conj(), scale.dtype)
            grad = grad.flatten(2)  # of x * weight * scale
            of_weight = None
            if ctx.needs_input_grad[1]:
                of_weight = (grad * x * scale).sum((0, 1))
            of_x = grad * weight
            along = (of_x * x).sum(-1, keepdim=True) * scale**3 / x.shape[-1]  # (B, N, 1)
            of_x = of_x.mul_(scale).addcmul_(x, along, value=-1).to(x.dtype)
        return of_x, of_weight, None, None, None, None, None


def _pairs(heads: Tensor) -> Tensor:
    """Return (B, N, H, d / 2) complex: neighbouring channels of (B, N, H, d), which share its memory."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


ROWS_AT_ONCE = 4096
"""Tokens whose activation is computed again at once, for the gradient of an adapter behind it."""


def gated_feed_forward(x: Tensor, hidden: Tensor, last: Affine, gate: Tensor) -> Tensor:
    """Return ``x + last(gelu(hidden)) * gate`` in x's dtype, all but an adapter of ``last`` frozen.

    x: (B, N, D). hidden: (B, N, F). last: F to D, readable. gate: (B, D) or (B, N, D).
    GELU is its tanh form. All that the backward needs is saved before anything is computed: a recompute
    that stops at the last tensor that was saved, as that of checkpointing does, leaves the product out.
    In the backward the gradient of the activation takes the place of the one that it is computed from, so
    that the widest tensor of a block is there twice instead of three times.
    """
    gate = gate.unsqueeze(1) if gate.ndim == 2 else gate
    factors = (last.scale, last.down, last.up)
    link = _SavedFirst.apply(hidden, gate, last.base.weight, *factors)  # type: ignore[no-untyped-call] # torch's own
    known = [None if t is None else t.detach() for t in (hidden, last.down, last.up)]
    out: Tensor = _FeedForwardEnd.apply(x, link, gate, last.base, last.scale, *known)  # type: ignore[no-untyped-call]
    return out


class _SavedFirst(torch.autograd.Function):
    """Saves what the backward needs, and does it. Its output holds nothing: it leads gradients here."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, gate: Tensor, weight: Tensor, scale: float, down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, gate, weight, down, up)
        ctx.scale = scale
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, gate, weight, down, up = ctx.saved_tensors
        of_down = of_up = None
        with exact(grad):
            rows = _times(grad, gate, hidden.dtype).reshape(-1, weight.shape[0])  # (T, D)
            own = rows @ restored(weight, rows.dtype)  # (T, F)
            if down is not None:
                thin = rows @ (up * ctx.scale).to(rows.dtype)  # (T, r)
                torch.addmm(own, thin, down.to(rows.dtype), out=own)
                of_down, of_up = _of_factors(hidden.flatten(0, -2), rows, thin, down, up)
                of_up.mul_(ctx.scale)
            own = own.view_as(hidden)
            torch.ops.aten.gelu_backward.grad_input(own, hidden, approximate="tanh", grad_input=own)
        return own, None, None, None, of_down, of_up


def _of_factors(
    hidden: Tensor, rows: Tensor, thin: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of an adapter's factors, that of ``up`` without the scale."""
    of_down, of_up = torch.zeros_like(down), torch.zeros_like(up)
    narrow = down.to(hidden.dtype).t()
    parts = (t.split(ROWS_AT_ONCE) for t in (hidden, rows, thin))
    for own, grad, low in zip(*parts, strict=True):
        active = F.gelu(own, approximate="tanh")
        of_down += low.t() @ active
        of_up += grad.t() @ (active @ narrow)
    return of_down, of_up


class _FeedForwardEnd(torch.autograd.Function):
    """Computes what :class:`_SavedFirst` has the gradient of, and saves nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, link: Tensor, gate: Tensor, base: nn.Module, scale: float,
        hidden: Tensor, down: Tensor | None, up: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.dtype = link.dtype
        with exact(x):
            y = _last(F.gelu(hidden, approximate="tanh"), base, scale, down, up)
            return _gated(x, y.view_as(x), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, grad.to(ctx.dtype), *(None,) * 6


def _last(
    active: Tensor, base: nn.Module, scale: float, down: Tensor | None, up: Tensor | None
) -> Tensor:
    """Return the last layer's output (T, D); ``active`` is gone by then."""
    active = active.flatten(0, -2)
    y: Tensor = base(active)
    if down is not None and up is not None:
        y = y.clone() if y._is_view() else y
        thin = active @ down.to(y.dtype).t()
        torch.addmm(y, thin, up.to(y.dtype).t(), alpha=scale, out=y)
    return y
