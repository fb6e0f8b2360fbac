"""The layers' own forward beside peft's, and where peft's stays in force."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from trainer_core import linear
from trainer_core.testing.counting import counted
from trainer_lora import adapter
from trainer_lora.shape import Shape

CPU = torch.device("cpu")
NAMES = ("q", "k", "v")


class Layers(nn.Module):
    """Three layers over the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(48, 48).requires_grad_(False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES)


def build(**more: Any) -> Layers:
    torch.manual_seed(0)
    module = Layers()
    form: dict[str, Any] = {"rank": 4, "alpha": 6.0, "dropout_ratio": 0.0, "targets": NAMES} | more
    adapter.inject(
        module, Shape(**form), dtype=torch.float32, device=CPU,
        generator=lambda name: torch.Generator().manual_seed(len(name)),
    )  # fmt: skip
    for number, (_, layer) in enumerate(adapter.adapted(module)):
        up = layer.lora_B[adapter.ADAPTER].weight
        up.data = torch.randn(up.shape, generator=torch.Generator().manual_seed(number))
    return module


def as_peft(module: Layers) -> Layers:
    twin = copy.deepcopy(module)
    for _, layer in adapter.adapted(twin):
        del layer.forward, layer.affine
    return twin


def outcome(module: Layers, x: Tensor, *, joint: bool = False) -> list[Tensor]:
    own = x.clone().requires_grad_()
    layers = [getattr(module, name) for name in NAMES]
    outs = linear.apply(layers, own) if joint else module(own)
    weights = list(adapter.weights(module).values())
    loss = sum((i + 1) * out.square().mean() for i, out in enumerate(outs))
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, [own, *weights])]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 10, 48, generator=torch.Generator().manual_seed(9))


def calls_of_peft(module: Layers, x: Tensor, *, joint: bool = False) -> int:
    real, seen = Linear.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return real(self, *args, **kwargs)

    with mock.patch.object(Linear, "forward", forward):
        outcome(module, x, joint=joint)
    return len(seen)


@pytest.mark.parametrize("joint", [False, True], ids=["each", "together"])
def test_the_same_values_and_gradients_as_peft(x, joint: bool):
    module = build()
    assert calls_of_peft(module, x, joint=joint) == 0
    ours, theirs = outcome(module, x, joint=joint), outcome(as_peft(module), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_less_is_written_than_by_peft(x):
    module, written = build(), []
    layers = [getattr(module, name) for name in NAMES]
    for own in (lambda: linear.apply(layers, x), lambda: module(x), lambda: as_peft(module)(x)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), counted() as seen:
            own()
        written.append(seen.bytes_written)
    together, each, peft = written
    assert together < each < 0.75 * peft


@pytest.mark.parametrize("more", [{"dora": True}, {"dropout_ratio": 0.5}], ids=["dora", "dropout"])
def test_what_is_more_than_a_product_of_low_rank_stays_pefts(x, more: dict[str, Any]):
    module = build(**more)
    assert calls_of_peft(module, x) == 3
    assert calls_of_peft(module, x, joint=True) == 3
    twin = as_peft(module)
    torch.manual_seed(1)
    ours = outcome(module, x, joint=True)
    torch.manual_seed(1)
    assert all(map(torch.equal, ours, outcome(twin, x)))


def test_dropout_acts_in_training_only(x):
    module = build(dropout_ratio=0.5).eval()
    assert calls_of_peft(module, x, joint=True) == 0
    ours, theirs = outcome(module, x, joint=True), outcome(as_peft(module), x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_switched_off_or_merged_adds_nothing_more(x):
    module = build()
    with_adapter = [out.detach() for out in module(x)]
    layers = [layer for _, layer in adapter.adapted(module)]
    for layer in layers:
        layer.enable_adapters(False)
    by_name = [getattr(module, name).base_layer(x) for name in NAMES]
    assert all(map(torch.equal, linear.apply([module.q, module.k, module.v], x), by_name))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    for own in (module(x), linear.apply([module.q, module.k, module.v], x)):
        for a, b in zip(own, with_adapter, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
