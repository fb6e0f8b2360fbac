"""Draws scalars of a run: ``python tests/bench/curves.py EVENTS.jsonl OUT.png --over NAME SCALAR ...``.

``--over step`` draws each scalar over the steps, as a running mean of ``--window`` of them. ``--over``
another scalar draws the mean of each scalar at each of its values: drift over the steps of a rollout,
say.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, EDGE, SCALE = 640, 340, 64, 2
INK, PALE = "#222222", "#dddddd"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
TICKS = 5

Line = tuple[str, list[tuple[float, float]]]


def read(path: Path, over: str, names: Sequence[str], window: int) -> list[Line]:
    """Return (name, points) of each scalar."""
    steps = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    steps = [event for event in steps if event["kind"] == "step" and names[0] in event]
    if over == "step":
        return [(name, _running([(e["step"], e[name]) for e in steps], window)) for name in names]
    groups: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for event in steps:
        groups[event[over]].append(event)
    return [
        (name, [(x, sum(e[name] for e in g) / len(g)) for x, g in sorted(groups.items())])
        for name in names
    ]


def _running(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    found = []
    for end in range(1, len(points) + 1):
        part = points[max(end - window, 0) : end]
        found.append((points[end - 1][0], sum(y for _, y in part) / len(part)))
    return found


def draw(lines: Sequence[Line], path: Path, *, over: str, title: str) -> None:
    """Write a PNG with all lines on one pair of axes."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12 * SCALE)
    xs = [x for _, points in lines for x, _ in points]
    ys = [0.0, *(y for _, points in lines for _, y in points)]
    box = (EDGE, 36, WIDTH - 20, HEIGHT - 48)

    def place(x: float, y: float) -> tuple[float, float]:
        across = box[0] + (x - min(xs)) / max(max(xs) - min(xs), 1e-9) * (box[2] - box[0])
        down = box[3] - (y - min(ys)) / max(max(ys) - min(ys), 1e-9) * (box[3] - box[1])
        return across * SCALE, down * SCALE

    for k in range(TICKS):
        x, y = (min(v) + (max(v) - min(v)) * k / (TICKS - 1) for v in (xs, ys))
        pen.line([place(x, min(ys)), place(x, max(ys))], fill=PALE, width=SCALE)
        pen.line([place(min(xs), y), place(max(xs), y)], fill=PALE, width=SCALE)
        left, down = place(x, min(ys))
        pen.text((left - 12 * SCALE, down + 6 * SCALE), f"{x:g}", fill=INK, font=font)
        pen.text((6 * SCALE, place(min(xs), y)[1] - 8 * SCALE), f"{y:.3g}", fill=INK, font=font)
    pen.text((EDGE * SCALE, 8 * SCALE), title, fill=INK, font=font)
    pen.text((WIDTH // 2 * SCALE, (HEIGHT - 24) * SCALE), over, fill=INK, font=font)
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        pen.line([place(x, y) for x, y in points], fill=colour, width=2 * SCALE)
        pen.text(((EDGE + 12) * SCALE, (44 + 18 * number) * SCALE), name, fill=colour, font=font)
    image.save(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("scalars", nargs="+")
    parser.add_argument("--over", default="step")
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--title", default="")
    given = parser.parse_args()
    lines = read(given.events, given.over, given.scalars, given.window)
    draw(lines, given.out, over=given.over, title=given.title)


if __name__ == "__main__":
    main()
