"""What a run shows in a terminal of 80 columns, and elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from trainer_core.progress import Display, step_note

SCALARS = {"loss": 0.12345, "lr": 1e-4}
TIMING = {"s_per_step": 12.34, "tokens_per_s": 43210.0, "peak_bytes": 17.5 * 2**30}


def bar(width: int) -> str:
    """Return the last line of the bar of step 12345 of 20000."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with Display(console).task("step", 20_000, start=12_344) as advance:
        advance(1, step_note(SCALARS, TIMING))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    found = [line.rstrip() for line in lines if "12345/20000" in line]
    assert found, out.getvalue()
    return found[-1]


@pytest.mark.parametrize(
    ("width", "note"),
    [
        (60, "loss 0.1235"),
        (80, "loss 0.1235  lr 1.00e-04  12.34 s/step"),
        (120, "loss 0.1235  lr 1.00e-04  12.34 s/step  43210 tokens/s  17.50 GiB"),
    ],
)
def test_step_count_time_left_and_loss_are_whole_at_every_width(width: int, note: str):
    line = bar(width)
    assert re.fullmatch(r"step \S+ +12345/20000 (\d+:\d\d:\d\d|-:--:--) (.*)", line), line
    assert line.endswith(f" {note}"), "parts that have no room are left out whole"
    assert len(line) <= width


def test_a_line_is_shown_as_it_is():
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=200, highlight=False)
        Display(console).say("a [b] :warning: c" * 9)
        assert out.getvalue() == "a [b] :warning: c" * 9 + "\n"
