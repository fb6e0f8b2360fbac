"""A block of Wan with diffusers' forward and its twin with ours, and what goes into both."""

from __future__ import annotations

import copy

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from trainer_core.blocks import BlockStack, TokenContext
from trainer_core.types import ForwardPlan
from trainer_wan.block import PARTS, take_over
from trainer_wan.network import BlockCaller

B, N, HEADS, HEAD = 2, 21, 2, 12
BOUND = 2e-6


def pair(width: int = HEADS * HEAD, ffn: int = 64, heads: int = HEADS, **options):
    """Return a block of diffusers with weights that are no defaults, and its twin with our forward."""
    stock = WanTransformerBlock(width, ffn, heads, cross_attn_norm=True, **options).train()
    for name, p in stock.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, mean=0.5, std=0.3)
    ours = copy.deepcopy(stock)
    take_over([ours])
    return stock, ours


def world(
    *, batch: int = B, num_tokens: int = N, width: int = HEADS * HEAD, text: int = 512,
    token_wise: bool = False, rope_batch: int = 1, head: int = HEAD,
) -> list:  # fmt: skip
    """Return tokens, text, time and rope, all but rope with a gradient."""
    time = (batch, num_tokens, 6, width) if token_wise else (batch, 6, width)
    drawn = [torch.randn(*s) for s in ((batch, num_tokens, width), (batch, text, width), time)]
    angle = torch.randn(rope_batch, num_tokens, 1, head // 2).repeat_interleave(2, -1)
    return [*(t.requires_grad_() for t in drawn), (angle.cos(), angle.sin())]


def results(block, given) -> dict[str, Tensor]:
    out = block(*given)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    wanted = {n: p for n, p in block.named_parameters() if p.requires_grad}
    wanted |= {
        n: t for n, t in zip(("tokens", "text", "time"), given, strict=False) if t.requires_grad
    }
    grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True)
    return {"out": out, **dict(zip(wanted, grads, strict=True))}


def differences(found, expected) -> list[str]:
    assert found.keys() == expected.keys()
    # Gradients of a bias in front of a softmax are sums that cancel: more rounding is left of them.
    apart = {n: (found[n] - e).abs().max() for n, e in expected.items() if e is not None}
    bound = {n: BOUND if n == "out" else 5 * BOUND for n in apart}
    return [n for n in apart if apart[n] > bound[n] * expected[n].abs().max().clamp(min=1e-2)]


def stack_of(policy: str = "none", *, num_blocks: int = 2, **options) -> BlockStack:
    blocks = nn.ModuleList(pair(48, 280, 2, **options)[1] for _ in range(num_blocks))
    return BlockStack(blocks, policy=policy, parts=PARTS)


def run_of(stack, given, *, chunk: int = 0, plan: ForwardPlan | None = None) -> Tensor:
    tokens, text, time, (cos, sin) = given
    per_token, shared = {"rope_cos": cos, "rope_sin": sin}, {"text": text}
    (per_token if time.ndim == 4 else shared)["time"] = time
    call = BlockCaller(chunk=chunk)
    return stack.run(tokens, call=call, context=TokenContext(per_token, shared), plan=plan)[0]


def grads_of(stack, given, **options) -> list[Tensor]:
    out = run_of(stack, given, **options)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    wanted = [*given[:3], *stack.blocks.parameters()]
    return [out, *torch.autograd.grad((out * weight).sum(), wanted)]
