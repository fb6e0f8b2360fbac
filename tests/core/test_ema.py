"""The average against its recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer_core import CheckpointError
from trainer_core.ema import Ema


def stepped(value: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((3,), value, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def test_updates_follow_the_recurrence_and_the_interval():
    p = stepped(0.0)
    ema = Ema({"w": p}, decay=0.5, interval=2)
    expected, num = 0.0, 0
    for step in range(1, 9):
        p.data.fill_(float(step))
        ema.update(step)
        if step % 2 == 0:
            keep = min((1 + num) / (10 + num), 0.5)
            expected, num = keep * expected + (1 - keep) * step, num + 1
    assert ema.shadow["w"].tolist() == pytest.approx([expected] * 3)


def test_the_shadow_is_float32_where_the_weights_are_not():
    p = stepped(1.0, torch.bfloat16)
    ema = Ema({"w": p}, decay=0.999, interval=1)
    ema.num_updates = 10_000
    p.data.fill_(1.0078125)
    ema.update(1)
    assert ema.shadow["w"].dtype == torch.float32
    assert float(ema.shadow["w"][0]) == pytest.approx(1 + 0.0078125 * 0.001, rel=1e-6)


def test_a_parameter_without_gradient_stays_out():
    p, q = stepped(1.0), stepped(1.0)
    ema = Ema({"p": p, "q": q}, decay=0.0, interval=1)
    p.data.fill_(5.0)
    q.data.fill_(5.0)
    q.grad = None
    ema.update(1)
    assert ema.shadow["q"].tolist() == [1.0] * 3
    assert ema.shadow["p"].tolist() != [1.0] * 3


def test_swapping_puts_the_average_in_and_the_live_weights_back_bit_for_bit():
    p = stepped(0.1)
    ema = Ema({"w": p}, decay=0.9, interval=1)
    p.data.fill_(0.3)
    live = p.detach().clone()

    def fail_inside() -> None:
        with ema.swapped():
            assert torch.equal(p.detach(), ema.shadow["w"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(p.detach(), live)


def test_state_round_trip_and_a_foreign_state():
    p = stepped(0.1)
    ema = Ema({"w": p}, decay=0.9, interval=1)
    p.data.fill_(0.7)
    ema.update(1)
    other = Ema({"w": stepped(9.0)}, decay=0.9, interval=1)
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    assert torch.equal(other.shadow["w"], ema.shadow["w"])
    assert other.num_updates == 1
    with pytest.raises(CheckpointError, match="another model"):
        other.load_state_dict({"x": torch.ones(1)})
