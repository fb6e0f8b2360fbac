"""Counts what a block of Wan 1.3B costs beside stock diffusers': ``python tests/bench/counts.py FOLDER``.

Operators and bytes written in a forward, bytes that a forward keeps for the backward, bytes that each
checkpoint policy holds until then and needs at once: in bfloat16 under autocast, in units of the tokens'
own bytes, so that the figures hold for any number of tokens and on any machine. Nothing is timed. Writes
counts.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from measure import adapt, fuse
from torch import Tensor, nn

from trainer_core.blocks import BlockStack, TokenContext
from trainer_core.testing.counting import counted, kept_bytes, memory_of
from trainer_wan.block import PARTS, take_over
from trainer_wan.network import BlockCaller

WIDTH, FFN, HEADS, TEXT, BLOCKS = 1536, 8960, 12, 512, 2
CASES = ("frozen with adapters", "all weights trained", "token-wise time")


@torch.library.custom_op("bench::rms_norm", mutates_args=())
def rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    """Stand in for the kernel that GPUs have and CPUs do not."""
    own = x.float()
    return (own * torch.rsqrt(own.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Take the ways of a GPU: RMS norm is one kernel, layer norm takes no mixed dtypes."""
    with (
        mock.patch("torch.nn.functional.rms_norm", rms_norm),
        mock.patch("trainer_wan.fused.mixes", return_value=False),
        mock.patch("trainer_wan.fused.writes_narrow", return_value=True),
    ):
        yield


class Pair:
    """The same blocks with both forwards, and what goes in."""

    def __init__(self, case: str, tokens: int) -> None:
        stock = nn.ModuleList(
            WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True) for _ in range(BLOCKS)
        )
        if case != "all weights trained":
            adapt(stock)
            for name, p in stock.named_parameters():
                if not p.requires_grad and "scale_shift_table" not in name and "norm2" not in name:
                    p.data = p.data.bfloat16()
        known = {id(t): t for t in stock.parameters()}
        ours = copy.deepcopy(stock, known)
        take_over(ours)
        fuse(ours)
        self.sides = {"stock": stock.train(), "ours": ours.train()}
        self.tokens = tokens
        size = (1, tokens, 6, WIDTH) if case == "token-wise time" else (1, 6, WIDTH)
        self.x = torch.randn(1, tokens, WIDTH, dtype=torch.bfloat16).requires_grad_()
        rope = torch.randn(2, 1, tokens, 1, WIDTH // HEADS)
        time = torch.randn(*size, dtype=torch.bfloat16)
        per_token = {"rope_cos": rope[0], "rope_sin": rope[1]}
        shared = {"text": torch.randn(1, TEXT, WIDTH, dtype=torch.bfloat16)}
        (per_token if time.ndim == 4 else shared)["time"] = time
        self.context = TokenContext(per_token, shared)

    @property
    def unit(self) -> int:
        """Bytes of the tokens, times the blocks."""
        return self.tokens * WIDTH * 2 * BLOCKS

    def forward(self, side: str, policy: str = "none", chunk: int = 0) -> Tensor:
        """Return the tokens behind the blocks."""
        parts = PARTS if side == "ours" else ()
        stack = BlockStack(self.sides[side], policy=policy, parts=parts)  # type: ignore[arg-type]
        stack.recomputed = frozenset({"ffn"} if chunk else ())
        with torch.autocast("cpu", torch.bfloat16):
            return stack.run(self.x, call=BlockCaller(chunk=chunk), context=self.context)[0]

    def work(self, side: str) -> dict[str, float]:
        """Return operators and units written of a block's forward."""
        with torch.no_grad(), counted() as seen:
            self.forward(side)
        return {
            "operators": seen.operators / BLOCKS,
            "written": round(seen.bytes_written / self.unit, 1),
        }

    def held(self, side: str, policy: str, chunk: int = 0) -> dict[str, float]:
        """Return units held between forward and backward, and at most at once in a step."""
        memory = memory_of(lambda: self.forward(side, policy, chunk))

        def step() -> None:
            self.forward(side, policy, chunk).float().sum().backward()

        step()
        peak = memory_of(step).peak_bytes
        return {"held": round(memory.end_bytes / self.unit, 1), "peak": round(peak / self.unit, 1)}


def measured(tokens: int) -> dict[str, Any]:
    """Return all tables."""
    found: dict[str, Any] = {"tokens": tokens, "blocks": BLOCKS, "cases": {}, "policies": {}}
    for case in CASES:
        pair = Pair(case, tokens)
        rows = found["cases"][case] = {}
        for side, blocks in pair.sides.items():
            rows[side] = pair.work(side)
            kept = kept_bytes(
                lambda s=side, p=pair: p.forward(s), besides=list(blocks.parameters())
            )
            rows[side]["kept"] = round(kept / pair.unit, 1)
        with as_on_a_gpu():
            for side in pair.sides:
                rows[side]["on a GPU"] = pair.work(side)
        if case == CASES[0]:
            for side, policy, chunk in (
                ("stock", "none", 0), ("stock", "full", 0), ("ours", "none", 0), ("ours", "ffn", 0),
                ("ours", "keep_attention", 0), ("ours", "full", 0), ("ours", "none", 256),
                ("ours", "full", 256),
            ):  # fmt: skip
                name = f"{side}, {policy}" + (f", chunks of {chunk}" if chunk else "")
                found["policies"][name] = pair.held(side, policy, chunk)
        print(json.dumps(rows), flush=True)
    print(json.dumps(found["policies"], indent=1))
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler says when it starts
    torch.manual_seed(0)
    given.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured(given.tokens), indent=2)
    (given.folder / "counts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
