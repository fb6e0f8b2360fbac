"""Draws what the data benchmark measured: time and memory against clips, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, EDGE = 520, 400, 70
SCALE = 2
"""The picture is drawn at twice its size, for sharp screens."""

INK, PALE, MARK = "#222222", "#dddddd", "#1f77b4"
PANELS = (
    ("warm start (plan and fill)", "s", "warm_start_s"),
    ("peak memory above the imports", "MB", "peak_mb"),
)

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path) -> None:
    """Write a PNG with a panel for time and one for memory, each with a line of slope one."""
    from PIL import Image, ImageDraw, ImageFont

    size = (WIDTH * len(PANELS) * SCALE, HEIGHT * SCALE)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13 * SCALE)
    for number, (title, unit, key) in enumerate(PANELS):
        points = [(float(row["files"]), max(float(row[key]), 1e-3)) for row in rows]
        _panel(pen, font, number * WIDTH, f"{title}, {unit}", points)
    image.save(path)


def _panel(
    pen: Any, font: Any, left: int, title: str, points: Sequence[tuple[float, float]]
) -> None:
    xs, ys = ([axis[k] for axis in points] for k in (0, 1))
    x_of = _axis(xs, left + EDGE, left + WIDTH - EDGE // 2)
    y_of = _axis(ys, HEIGHT - EDGE, EDGE)
    box = [left + EDGE, EDGE, left + WIDTH - EDGE // 2, HEIGHT - EDGE]
    pen.text(_at(left + EDGE, EDGE - 40), title, fill=INK, font=font)
    pen.text(_at(left + WIDTH // 2, HEIGHT - EDGE + 34), "clips", fill=INK, font=font)
    for value in _decades(xs):
        pen.line([_at(x_of(value), box[1]), _at(x_of(value), box[3])], fill=PALE, width=SCALE)
        pen.text(_at(x_of(value) - 16, box[3] + 8), f"{value:,.0f}", fill=INK, font=font)
    for value in _decades(ys):
        pen.line([_at(box[0], y_of(value)), _at(box[2], y_of(value))], fill=PALE, width=SCALE)
        pen.text(_at(left + 14, y_of(value) - 8), f"{value:g}", fill=INK, font=font)
    # slope one through the last point: what linear growth looks like
    first, last = xs[0], points[-1]
    ends = [(first, last[1] * first / last[0]), last]
    pen.line([_at(x_of(x), y_of(y)) for x, y in ends], fill="#bbbbbb", width=2 * SCALE)
    pen.line([_at(x_of(x), y_of(y)) for x, y in points], fill=MARK, width=2 * SCALE)
    for x, y in points:
        across, down = _at(x_of(x), y_of(y))
        ball = 5 * SCALE
        pen.ellipse([across - ball, down - ball, across + ball, down + ball], fill=MARK)
        pen.text((across - 40 * SCALE, down - 26 * SCALE), f"{y:.3g}", fill=INK, font=font)
    pen.rectangle([*_at(box[0], box[1]), *_at(box[2], box[3])], outline=INK, width=SCALE)


def _at(x: float, y: float) -> tuple[float, float]:
    return x * SCALE, y * SCALE


def _bounds(values: Sequence[float]) -> tuple[int, int]:
    low, high = floor(log10(min(values))), floor(log10(max(values)) - 1e-9) + 1
    return low, max(high, low + 1)


def _axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = _bounds(values)
    return lambda value: start + (log10(value) - low) / (high - low) * (end - start)


def _decades(values: Sequence[float]) -> list[float]:
    low, high = _bounds(values)
    return [10.0**power for power in range(low, high + 1)]
