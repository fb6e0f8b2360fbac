"""Measures a step of blocks against stock diffusers: ``python tests/bench/step.py FOLDER [--quick]``.

Blocks of the shape of Wan 1.3B and 14B and of width 512, LoRA of rank 16 on q, k, v and out of both
attentions, forward and backward, every checkpoint policy, and TREAD at ratio 0.5. All variants take turns
in one process, in another order each round; they share their weights. A ratio is the time of a variant
over that of stock diffusers in the same round, under the policy that stock knows (none, or whole blocks);
told are the median, its bootstrap interval, and peak bytes beyond the weights. Writes step.json and, with
two or more numbers of tokens, a step-SHAPE.png each. ``--device cuda`` runs the same in bfloat16 under
autocast, timed by events, with the share of the card's measured peak. ``--other FOLDER`` adds a column: a
``block.py`` in it that has ``take_over(blocks)``, as ``trainer_wan.block`` has."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from curves import draw
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from measure import adapt, fuse, interval, machine, peak_flops, seconds
from torch import Tensor, nn

from trainer_core.blocks import BlockStack, TokenContext
from trainer_core.testing.counting import memory_of
from trainer_core.types import ForwardPlan, Route
from trainer_tread.flops import Passes
from trainer_wan.block import PARTS, take_over
from trainer_wan.network import call_block

TEXT, HEAD_DIM, DROP = 512, 128, 0.5
POLICIES = ("none", "full", "ffn", "keep_attention")


@dataclass(frozen=True)
class Shape:
    """One block."""

    width: int
    ffn: int

    @property
    def heads(self) -> int:
        """Heads of 128."""
        return self.width // HEAD_DIM

    def flops(self, tokens: int, policy: str, *, ours: bool = True) -> float:
        """Return the operations of a step of one block, recomputes included.

        Ours computes the last product of a feed-forward once.
        """
        width, linear = self.width, 4 * self.width * self.ffn
        last = linear / 2 if ours else 0.0
        weights = 12 * width**2 + linear
        attention = 4 * width * tokens * (tokens + TEXT)
        again = {
            "none": (0.0, 0.0, 0.0),
            "full": (1 - last / weights, 1.0, 1.0),
            "ffn": ((linear - last) / weights, 0.0, 0.0),
            "keep_attention": (1 - last / weights, TEXT / (tokens + TEXT), 1.0),
        }[policy]
        passes = Passes(2 + again[0], 3 + again[1], 1 + again[2])  # frozen weights
        return passes.of((weights * tokens, attention, 4 * TEXT * width**2))


SHAPES = {"512": Shape(512, 2048), "1.3B": Shape(1536, 8960), "14B": Shape(5120, 13824)}


@dataclass(frozen=True)
class Variant:
    """side: "stock", "ours" or "other"."""

    side: str
    policy: str
    tread: bool = False

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.side} {self.policy}{' tread' if self.tread else ''}"

    @property
    def against(self) -> str:
        """The variant of stock diffusers that it is compared with."""
        return f"stock {'none' if self.policy == 'none' else 'full'}"


def variants(policies: Sequence[str], other: bool) -> list[Variant]:
    """Return all that is measured."""
    sides = ["ours", "other"] if other else ["ours"]
    stock = ["none", "full"] if set(policies) - {"none"} else ["none"]
    found = [Variant("stock", policy) for policy in stock]
    found += [Variant(side, policy) for side in sides for policy in policies]
    return [*found, Variant("ours", policies[-1] if "full" not in policies else "full", tread=True)]


class Bench:
    """All variants of one shape and number of tokens."""

    def __init__(
        self,
        shape: Shape,
        tokens: int,
        *,
        blocks: int,
        device: str,
        other: Callable[..., None] | None,
    ) -> None:
        self.tokens, self.device = tokens, device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        stock = nn.ModuleList(
            WanTransformerBlock(shape.width, shape.ffn, shape.heads, cross_attn_norm=True)
            for _ in range(blocks)
        )
        adapt(stock)
        for name, p in stock.named_parameters():
            if not p.requires_grad and "scale_shift_table" not in name and "norm2" not in name:
                p.data = p.data.to(dtype)
        stock.to(device).train()
        self.sides = {"stock": stock, "ours": self._twin(stock)}
        take_over(self.sides["ours"])
        fuse(self.sides["ours"])
        if other is not None:
            self.sides["other"] = self._twin(stock)
            other(self.sides["other"])
        make = {"device": device}
        self.x = torch.randn(1, tokens, shape.width, **make).to(dtype).requires_grad_()
        rope = torch.randn(2, 1, tokens, 1, HEAD_DIM // 2, **make).repeat_interleave(2, -1)
        self.context = TokenContext(
            per_token={"rope_cos": rope[0].cos(), "rope_sin": rope[0].sin()},
            shared={
                "text": torch.randn(1, TEXT, shape.width, **make).to(dtype),
                "time": torch.randn(1, 6, shape.width, **make),
            },
        )
        kept = torch.rand(tokens).argsort()[: tokens - round(DROP * tokens)].sort().values
        ids = kept[None].to(device)
        self.plan = ForwardPlan(((Route("tread", 0, blocks - 1, lambda *_: ids), ids),))

    @staticmethod
    def _twin(blocks: nn.ModuleList) -> nn.ModuleList:
        shared = {id(t): t for t in (*blocks.parameters(), *blocks.buffers())}
        twin: nn.ModuleList = copy.deepcopy(blocks, shared)
        return twin

    def forward(self, variant: Variant) -> Tensor:
        """Return the tokens behind the blocks."""
        parts = PARTS if variant.side == "ours" else ()
        stack = BlockStack(self.sides[variant.side], policy=variant.policy, parts=parts)
        cast = nullcontext() if self.device == "cpu" else torch.autocast("cuda", torch.bfloat16)
        plan = self.plan if variant.tread else None
        with cast:
            return stack.run(self.x, call=call_block, context=self.context, plan=plan)[0]

    def step(self, variant: Variant) -> None:
        """Do one forward and backward."""
        self.forward(variant).float().square().mean().backward()

    def clear(self) -> None:
        """Drop the gradients, as the optimiser's step would."""
        self.x.grad = None
        for blocks in self.sides.values():
            blocks.zero_grad(set_to_none=True)

    def apart(self) -> float:
        """Return the largest difference of ours from stock, as a share of the output's maximum."""
        with torch.no_grad():
            ours, stock = (self.forward(Variant(side, "none")) for side in ("ours", "stock"))
        return float((ours - stock).abs().max() / stock.abs().max())


def rounds(bench: Bench, all_of: Sequence[Variant], count: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round."""
    found: dict[str, list[float]] = {variant.name: [] for variant in all_of}
    for number in range(count):
        turn = number % len(all_of)
        order = [*all_of[turn:], *all_of[:turn]]
        for variant in order if number % 2 == 0 else order[::-1]:
            found[variant.name].append(seconds(lambda v=variant: bench.step(v), bench.device))
            bench.clear()
    return found


def measured(name: str, tokens: int, given: argparse.Namespace, other: Any, peak: float) -> Any:
    """Return the row of one shape and number of tokens."""
    shape = SHAPES[name]
    bench = Bench(shape, tokens, blocks=given.blocks, device=given.device, other=other)
    all_of = variants(given.policies, other is not None)
    memory = {}
    for variant in all_of:  # also the warm-up
        memory[variant.name] = memory_of(
            lambda v=variant: bench.step(v), device=given.device
        ).peak_bytes
        bench.clear()
    times = rounds(bench, all_of, given.rounds)
    row: dict[str, Any] = {"shape": name, **asdict(shape), "tokens": tokens, "blocks": given.blocks}
    row |= {"apart": bench.apart(), "variants": {}}
    for variant in all_of:
        own, base = times[variant.name], times[variant.against]
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        low, high = interval(ratios, statistics.median)
        entry = {
            "median_s": statistics.median(own),
            "against": variant.against,
            "ratio": statistics.median(ratios),
            "interval": [low, high],
            "peak_bytes": memory[variant.name],
            "peak_ratio": memory[variant.name] / memory[variant.against],
            "seconds": own,
        }
        if not variant.tread:
            flops = shape.flops(tokens, variant.policy, ours=variant.side == "ours") * given.blocks
            entry["tflops"] = flops / entry["median_s"] / 1e12
            entry["share_of_peak"] = flops / entry["median_s"] / peak
        row["variants"][variant.name] = entry
    if {"full", "keep_attention"} <= set(given.policies):
        row["keep_attention"] = gain(shape, tokens, times)
    return row


def gain(shape: Shape, tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return how much faster keeping attention is than whole recomputes, and what is modelled."""
    pairs = zip(times["ours full"], times["ours keep_attention"], strict=True)
    ratios = [full / kept for full, kept in pairs]
    model = shape.flops(tokens, "full") / shape.flops(tokens, "keep_attention")
    found = statistics.median(ratios)
    return {
        "gain": found,
        "interval": list(interval(ratios, statistics.median)),
        "modelled": model,
        "share_of_modelled": (found - 1) / (model - 1),
    }


def tell(row: dict[str, Any]) -> None:
    """Print a row as a table."""
    head = f"{row['shape']}: width {row['width']}, {row['tokens']} tokens, {row['blocks']} blocks"
    print(f"{head}, ours differs from stock by {row['apart']:.1e} of the maximum")
    for name, found in row["variants"].items():
        low, high = found["interval"]
        extra = ""
        if "tflops" in found:
            extra = f"{found['tflops']:8.3f} TFLOP/s {found['share_of_peak']:5.0%} of peak"
        print(
            f"  {name:22} {found['median_s']:8.3f} s  {found['ratio']:.3f} [{low:.3f}, {high:.3f}] of "
            f"{found['against']:10}  peak {found['peak_bytes'] / 2**20:8.1f} MiB "
            f"({found['peak_ratio']:.2f}) {extra}",
            flush=True,
        )
    if kept := row.get("keep_attention"):
        print(
            f"  keep_attention over full: {kept['gain']:.3f}x, modelled {kept['modelled']:.3f}x "
            f"({kept['share_of_modelled']:.0%} of the modelled gain)"
        )


def loaded(folder: Path | None) -> Callable[..., None] | None:
    """Return ``take_over`` of a folder's ``block.py``."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("other_block", folder / "block.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no block.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_block"] = module
    spec.loader.exec_module(module)
    found: Callable[..., None] = module.take_over
    return found


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--shapes", nargs="+", default=["512", "1.3B", "14B"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1040, 4080])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--other", type=Path, help="folder with a block.py that has take_over")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    given = arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler says when it starts
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    other, dtype = loaded(given.other), torch.float32 if given.device == "cpu" else torch.bfloat16
    peak = peak_flops(given.device, dtype)
    cases = [(shape, tokens) for shape in given.shapes for tokens in given.tokens]
    if given.quick:
        given.rounds, cases = 5, [("512", 520), ("512", 1560), ("1.3B", 390)]
    rows = []
    given.folder.mkdir(parents=True, exist_ok=True)
    facts = machine(given.device) | {"peak_tflops": peak / 1e12, "dtype": str(dtype)}
    for shape, tokens in cases:
        rows.append(measured(shape, tokens, given, other, peak))
        tell(rows[-1])
        text = json.dumps({"machine": facts, "rounds": given.rounds, "rows": rows}, indent=2)
        (given.folder / "step.json").write_text(text + "\n", encoding="utf-8")
    plot(rows, given.folder)


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write a picture of seconds over tokens for each shape that was measured at several."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        names = ["stock full", "ours full", "ours keep_attention", "ours none"]
        lines = [
            (name, [(float(r["tokens"]), r["variants"][name]["median_s"]) for r in own])
            for name in names
            if name in own[0]["variants"]
        ]
        if len(own) > 1:
            title = f"seconds of a step, block of {shape}"
            draw(lines, folder / f"step-{shape}.png", over="tokens", title=title)


if __name__ == "__main__":
    main()
