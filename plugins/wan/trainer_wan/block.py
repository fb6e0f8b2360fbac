"""The forward of a Wan block over diffusers' own modules, with less memory traffic than diffusers'.

``take_over`` gives a ``WanTransformerBlock`` this forward; weights, adapters, quantised layers and hooks
stay where they are. Query, key and value read the same tokens, so they are computed together
(:mod:`trainer_core.linear`); other linear layers are called. What is replaced is the work between them:
norms, modulation, gates and position codes, and those only where nobody has put anything else there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from trainer_core import linear
from trainer_core.linear import untouched
from trainer_wan.fused import (
    LOW,
    Turn,
    exact,
    gated_add,
    gated_feed_forward,
    head_norm,
    layer_norm,
    modulated_norm,
    rotate,
    turns,
)

TEXT_TOKENS = 512
"""Text tokens at the end of the context; what comes before them are image tokens."""

PARTS = ("self_attention", "cross_attention", "ffn")
"""Names of the residual branches of a block, in the order in which they follow each other."""

Part = Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]
"""``part(name, compute, tokens)`` returns ``compute(tokens)``; who calls the block may recompute it."""


def take_over(blocks: Iterable[nn.Module]) -> None:
    """Give each block of diffusers' own class :func:`forward`; strangers keep theirs."""
    for block in blocks:
        if type(block) is WanTransformerBlock and "forward" not in vars(block):
            block.forward = MethodType(forward, block)  # type: ignore[method-assign] # on purpose


def _at_once(name: str, compute: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return compute(tokens)


def forward(
    block: Any,
    tokens: Tensor,
    text: Tensor,
    time: Tensor,
    rope: tuple[Tensor, Tensor],
    part: Part = _at_once,
    chunk: int = 0,
) -> Tensor:
    """Return the tokens (B, N, D) behind the block.

    text: (B, L, D), with image tokens in front of the last 512 where the block looks at an image. time:
    (B, 6, D), or (B, N, 6, D) with token-wise timesteps. rope: cos and sin (1 or B, N, 1, head_dim).
    part: see :data:`Part`. chunk: tokens that the feed-forward takes at once, 0 for all.
    """
    modulation = Modulation(block.scale_shift_table, time)
    turn = turns(*rope)

    def self_attention(x: Tensor) -> Tensor:
        y = _modulate(block.norm1, x, modulation, 0)
        return gated_add(x, _attend(block.attn1, y, rope=rope, turn=turn), modulation.of(2))

    def cross_attention(x: Tensor) -> Tensor:
        return x + _attend(block.attn2, _norm(block.norm2, x), text=text)

    tokens = part("self_attention", self_attention, tokens)
    tokens = part("cross_attention", cross_attention, tokens)
    if not chunk or chunk >= tokens.shape[1]:
        return part("ffn", _FeedForward(block, modulation), tokens)
    done = [
        part("ffn", _FeedForward(block, modulation, slice(start, start + chunk)), rows)
        for start, rows in zip(
            range(0, tokens.shape[1], chunk), tokens.split(chunk, dim=1), strict=True
        )
    ]
    return torch.cat(done, dim=1)


@dataclass(frozen=True)
class _FeedForward:
    """The feed-forward branch over the rows of some tokens."""

    block: Any
    modulation: Modulation
    rows: slice | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = _modulate(self.block.norm3, x, self.modulation, 3, self.rows)
        gate, ffn = self.modulation.of(5, self.rows), self.block.ffn
        if not _is_plain(ffn) or gate.requires_grad or torch.compiler.is_compiling():
            return gated_add(x, ffn(y), gate)
        first, _, last = ffn.net
        hidden = first.proj(y)  # (B, N, F)
        own = linear.readable(last, like=hidden)
        if own is not None:
            return gated_feed_forward(x, hidden, own, gate)
        return gated_add(x, last(F.gelu(hidden, approximate="tanh")), gate)


def _is_plain(ffn: Any) -> bool:
    """Whether a feed-forward is diffusers' own and drops nothing; its linear layers may be any."""
    if not untouched(ffn, FeedForward) or len(ffn.net) != 3:
        return False
    first, dropout, _ = ffn.net
    drops = not untouched(dropout, nn.Dropout) or (dropout.p and dropout.training)
    return untouched(first, GELU) and first.approximate == "tanh" and not drops


class Modulation:
    """The six coefficients of a block: shift, scale, gate of attention and of the feed-forward.

    table: (1, 6, D) of the block. time: (B, 6, D) or (B, N, 6, D).
    """

    def __init__(self, table: Tensor, time: Tensor) -> None:
        table = table.float() if table.dtype in LOW else table
        self.token_wise = time.ndim == 4
        with exact(table):
            self.own: Sequence[Tensor] = (table if self.token_wise else table + time).unbind(1)
        self.times: Sequence[Tensor] = time.unbind(2) if self.token_wise else ()

    def of(self, number: int, rows: slice | None = None, *, plus: float = 0.0) -> Tensor:
        """Return coefficient ``number`` and ``plus``, (B, D) or (B, rows, D), float32 or wider.

        Token-wise ones are as large as the tokens, so each is made where it is used and no earlier.
        """
        with exact(self.own[number]):
            own = self.own[number] + plus if plus else self.own[number]  # (1 or B, D)
            if not self.token_wise:
                return own
            time = self.times[number]  # (B, N, D)
            return own + (time if rows is None else time[:, rows])


def _modulate(
    norm: Any, x: Tensor, modulation: Modulation, first: int, rows: slice | None = None
) -> Tensor:
    """Return ``norm(x) * (1 + scale) + shift``; shift is coefficient ``first``, scale the next."""
    shift = modulation.of(first, rows)
    scale = modulation.of(first + 1, rows, plus=1.0)
    if untouched(norm, FP32LayerNorm) and norm.weight is None:
        return modulated_norm(x, scale, shift, eps=norm.eps)
    if shift.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return torch.addcmul(shift, norm(x).to(shift.dtype), scale).to(x.dtype)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Return a norm with weights of its own, or whatever stands in its place, in x's dtype."""
    if untouched(norm, FP32LayerNorm) and norm.weight is not None:
        with exact(x):
            return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    return norm(x).to(x.dtype)  # type: ignore[no-any-return] # a module's


def _attend(
    attention: Any,
    x: Tensor,
    *,
    text: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    turn: Turn | None = None,
) -> Tensor:
    """Return what ``WanAttention`` does with x (B, N, D); the context is x itself without ``text``."""
    ours = "forward" not in vars(attention) and type(attention.processor) is WanAttnProcessor
    if not ours or getattr(attention, "fused_projections", False):
        return attention(x, text, None, rope)  # type: ignore[no-any-return] # a module's
    image = None
    if attention.add_k_proj is not None and text is not None:
        image, text = text[:, :-TEXT_TOKENS], text[:, -TEXT_TOKENS:]
    if text is None:
        query, key, value = linear.apply((attention.to_q, attention.to_k, attention.to_v), x)
    else:
        query = attention.to_q(x)
        key, value = linear.apply((attention.to_k, attention.to_v), text)
    value = value.unflatten(2, (attention.heads, -1))  # (B, L, H, d)
    query, key = (
        _heads(norm, t, attention.heads, turn, value.dtype)
        for norm, t in ((attention.norm_q, query), (attention.norm_k, key))
    )
    out = _dot_product(attention, query, key, value, of_itself=text is None)
    if image is not None:
        heads = attention.heads
        key, value = linear.apply((attention.add_k_proj, attention.add_v_proj), image)
        value = value.unflatten(2, (heads, -1))
        key = _heads(attention.norm_added_k, key, heads, None, value.dtype)
        out = out + _dot_product(attention, query, key, value, of_itself=False)
    return attention.to_out[1](attention.to_out[0](out))  # type: ignore[no-any-return] # a module's


def _heads(norm: Any, x: Tensor, heads: int, turn: Turn | None, dtype: torch.dtype) -> Tensor:
    """Return x (B, N, H * d) as heads (B, N, H, d), normed over all of them and then turned."""
    if untouched(norm, nn.RMSNorm):
        return head_norm(x, norm.weight, eps=norm.eps, heads=heads, turn=turn, dtype=dtype)
    normed = norm(x).unflatten(2, (heads, -1))
    return normed.to(dtype) if turn is None else rotate(normed, turn, dtype=dtype)


def _dot_product(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *, of_itself: bool
) -> Tensor:
    """Return attention's output (B, N, D) through the kernel that the processor names."""
    processor = attention.processor
    out: Tensor = dispatch_attention_fn(
        query,
        key,
        value,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config if of_itself else None,
    )
    return out.flatten(2, 3).type_as(query)
