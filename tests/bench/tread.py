"""Measures how much faster blocks of Wan train with TREAD: ``python tests/bench/tread.py FOLDER``.

Two blocks of the shape of Wan 2.1 1.3B (width 1536, feed-forward 8960, 12 heads), all routed, LoRA of
rank 16 on attention, gradient checkpointing, forward and backward in float32, at ``--tokens`` tokens.
Plain and routed steps alternate in one process and take turns in coming first; each pair gives one ratio.
The result is the median ratio with a bootstrap interval, beside what counting operations predicts. The
plugin draws the ids inside the measured step. Writes tread.json. With ``--device cuda`` it runs on a GPU,
in bfloat16 under autocast."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from measure import adapt, fuse, interval, machine
from torch import nn

from trainer_core.blocks import BlockStack, TokenContext, draw_plan
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import ForwardPlan, Moment, Placement, Route
from trainer_tread.flops import Cost, speed_up, training_passes
from trainer_tread.hooks import Forced, Kept
from trainer_tread.routing import num_kept
from trainer_wan.block import take_over
from trainer_wan.network import call_block

WIDTH, FFN, HEADS, HEAD_DIM, TEXT = 1536, 8960, 12, 128, 512
RATIOS = (0.1, 0.25, 0.5)


def cost(num_tokens: int) -> Cost:
    """Return the operations of one block's forward."""
    return (
        (12 * WIDTH**2 + 4 * WIDTH * FFN) * num_tokens,
        4 * WIDTH * num_tokens * (num_tokens + TEXT),
        4 * TEXT * WIDTH**2,
        2 * WIDTH * FFN * num_tokens,
    )


def build(num_blocks: int, device: str) -> BlockStack:
    """Return blocks with adapters, under checkpointing."""
    blocks = nn.ModuleList(
        WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True) for _ in range(num_blocks)
    )
    adapt(blocks)
    take_over(blocks)
    fuse(blocks)
    return BlockStack(blocks.train().to(device), policy="full")


class Bench:
    """Plain and routed steps of one size."""

    def __init__(self, *, num_tokens: int, num_blocks: int, device: str) -> None:
        self.num_tokens, self.num_blocks, self.device = num_tokens, num_blocks, device
        self.stack = build(num_blocks, device)
        target = torch.device(device)
        placement = Placement(target, torch.float32, torch.float32)
        self.run = Run(CoreSettings(), placement=placement, output_dir=Path("."))
        rope = torch.randn(2, 1, num_tokens, 1, HEAD_DIM, device=device)
        self.tokens = torch.randn(1, num_tokens, WIDTH, device=device, requires_grad=True)
        self.context = TokenContext(
            per_token={"rope_cos": rope[0], "rope_sin": rope[1]},
            shared={
                "text": torch.randn(1, TEXT, WIDTH, device=device),
                "time": torch.randn(1, 6, WIDTH, device=device),
            },
        )
        self.count = 0

    def step(self, drop_ratio: float | None) -> float:
        """Return the seconds of one forward and backward; None runs without a route."""
        self.count += 1
        moment, routes = Moment(step=self.count), []
        if drop_ratio is not None:
            span = (0, self.num_blocks - 1)
            keep = Kept(self.run, 0, span, drop_ratio, Forced(self.run)).ids
            routes = [Route("tread", *span, keep=keep)]
        self.synchronise()
        start = time.perf_counter()
        plan = draw_plan(routes, (), 1, self.num_tokens, moment) if routes else ForwardPlan()
        with self.autocast():
            out, _ = self.stack.run(self.tokens, call=call_block, context=self.context, plan=plan)
            out.float().square().mean().backward()
        self.synchronise()
        self.stack.blocks.zero_grad(set_to_none=True)
        self.tokens.grad = None
        return time.perf_counter() - start

    def autocast(self) -> Any:
        """Return bfloat16 autocast on an accelerator, nothing on the CPU."""
        return (
            nullcontext() if self.device == "cpu" else torch.autocast(self.device, torch.bfloat16)
        )

    def synchronise(self) -> None:
        """Wait for an accelerator."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def ratio_of_pairs(self, drop_ratio: float, pairs: int) -> dict[str, Any]:
        """Return what the pairs of one drop ratio gave."""
        plain, routed = [], []
        for number in range(pairs):
            order: list[tuple[list[float], float | None]] = [(plain, None), (routed, drop_ratio)]
            for into, drop in order if number % 2 == 0 else order[::-1]:
                into.append(self.step(drop))
        ratios = [a / b for a, b in zip(plain, routed, strict=True)]
        low, high = interval(ratios, statistics.median)
        model = speed_up(
            cost,
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens,
            routes=[(self.num_blocks, num_kept(self.num_tokens, drop_ratio))],
            passes=training_passes(trains_weights=False, recomputes=True),
        )
        return {
            "drop_ratio": drop_ratio,
            "tokens": self.num_tokens,
            "kept": num_kept(self.num_tokens, drop_ratio),
            "plain_s": statistics.median(plain),
            "routed_s": statistics.median(routed),
            "speed_up": statistics.median(ratios),
            "interval": [low, high],
            "model": model,
            "reaches_the_model": high >= model,
            "pairs": [list(pair) for pair in zip(plain, routed, strict=True)],
        }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4080)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    bench = Bench(num_tokens=given.tokens, num_blocks=given.blocks, device=given.device)
    for drop_ratio in (None, max(given.ratios)):
        bench.step(drop_ratio)  # warm-up
    rows = []
    for drop_ratio in given.ratios:
        row = bench.ratio_of_pairs(drop_ratio, given.pairs)
        rows.append(row)
        print(
            f"ratio {drop_ratio}: {row['tokens']} tokens, {row['kept']} kept: "
            f"{row['plain_s']:.2f} s -> {row['routed_s']:.2f} s, {row['speed_up']:.2f}x "
            f"[{row['interval'][0]:.2f}, {row['interval'][1]:.2f}], model {row['model']:.2f}x",
            flush=True,
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"machine": machine(given.device), "blocks": given.blocks, "rows": rows}, indent=2
    )
    (given.folder / "tread.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
