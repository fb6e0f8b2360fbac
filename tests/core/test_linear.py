"""Linear layers that read the same tokens, with adapters and without: values, gradients, work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer_core import linear
from trainer_core.linear import Affine
from trainer_core.testing.counting import counted, kept_bytes

WIDTH, ROWS, RANK = 6, 5, 2


class Adapted(nn.Module):
    """``base(x) + scale x down^T up^T`` by the formula, and as :class:`Affine`."""

    def __init__(self, base: nn.Module, scale: float, width: int, rank: int = RANK) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Parameter(torch.randn(rank, width))
        self.up = nn.Parameter(torch.randn(width, rank))

    def affine(self) -> Affine:
        return Affine(self.base, self.down, self.up, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        low = x.to(self.down.dtype) @ self.down.t() @ self.up.t()
        out: Tensor = self.base(x) + self.scale * low
        return out


class Scaled(nn.Module):
    """Stands for a quantised layer: linear, but nobody may read its weight."""

    def __init__(self, width: int, *, view: bool) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.randn(width, width))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.hidden.t().to(x.dtype)
        return out[:] if self.view else out


def frozen(width: int = WIDTH) -> nn.Linear:
    return nn.Linear(width, width).requires_grad_(False)


def layers_of(kind: str, width: int = WIDTH, rank: int = RANK) -> list[nn.Module]:
    """Return query, key and value of a kind."""
    torch.manual_seed(3)
    if kind == "plain":
        return [frozen(width) for _ in range(3)]
    if kind == "mixed":
        return [Adapted(frozen(width), 0.5, width, rank), frozen(width),
                Adapted(frozen(width), 2.0, width, rank + 1)]  # fmt: skip
    if kind == "stored":
        return [Adapted(Scaled(width, view=i == 1), 1.5, width, rank) for i in range(3)]
    return [Adapted(frozen(width), 0.5 + i, width, rank) for i in range(3)]


KINDS = ("plain", "adapted", "mixed", "stored")


def results(layers: list[nn.Module], x: Tensor, *, joint: bool) -> list[Tensor]:
    """Return outputs, and gradients of x and of all parameters, from a loss that tells all apart."""
    own = x.clone().requires_grad_()
    outs = linear.apply(layers, own) if joint else tuple(layer(own) for layer in layers)
    loss = sum((out.double() ** 2).sum() * (i + 1) for i, out in enumerate(outs))
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [own, *trained])
    return [*(out.detach() for out in outs), *grads]


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, ROWS, WIDTH)], ids=["rows", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_layers(kind: str, shape: tuple[int, ...]):
    layers = [layer.double() for layer in layers_of(kind)]
    x = torch.randn(*shape, dtype=torch.float64)
    ours, theirs = results(layers, x, joint=True), results(layers, x, joint=False)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strided_gradient_is_no_harm(kind: str):
    """Attention hands back views whose rows do not lie side by side."""
    layers = [layer.double() for layer in layers_of(kind)]
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    found = []
    for joint in (True, False):
        own = x.clone().requires_grad_()
        outs = linear.apply(layers, own) if joint else [layer(own) for layer in layers]
        wide = torch.stack(list(outs), -1).transpose(1, 2)
        found.append(torch.autograd.grad((wide**3).sum(), own)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def distances(kind: str, x: Tensor, *, joint: bool) -> list[float]:
    """Return how far outputs and gradients lie from those in float64, as a root mean square.

    Weights in bfloat16 beside adapters in float32, under autocast.
    """
    layers = layers_of(kind, x.shape[1], 8)
    for layer in layers:
        (layer.base if isinstance(layer, Adapted) else layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layers, x, joint=joint)
    exact = results([layer.double() for layer in layers], x.double(), joint=False)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("kind", ["adapted", "mixed"])
def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_layers(kind: str):
    torch.manual_seed(5)
    draws = [torch.randn(40, 64).bfloat16() for _ in range(12)]
    ours, theirs = (
        [sum(own) for own in zip(*(distances(kind, x, joint=joint) for x in draws), strict=True)]
        for joint in (True, False)
    )
    assert max(ours) < 12 * 6e-3
    assert all(a <= b * 1.01 for a, b in zip(ours, theirs, strict=True))
    assert sum(ours) < 0.97 * sum(theirs)


def test_gradients_keep_the_dtype_of_their_parameters():
    layers = layers_of("adapted")
    for layer in layers:
        layer.base.bfloat16()  # type: ignore[union-attr]
    x = torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outs = linear.apply(layers, x)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    sum(out.float().sum() for out in outs).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for layer in layers for p in layer.parameters() if p.grad is not None} == {
        torch.float32
    }


def big() -> tuple[list[nn.Module], Tensor]:
    return layers_of("adapted", 128, 2), torch.randn(256, 128)


def test_the_adapters_write_nothing_of_the_size_of_the_tokens():
    layers, x = big()
    with torch.no_grad(), counted() as ours:
        linear.apply(layers, x)
    with torch.no_grad(), counted() as theirs:
        for layer in layers:
            layer(x)
    unit = x.nbytes
    # Results of operators: three products, each written again by what is added inside of it.
    assert ours.bytes_written < 6.2 * unit
    assert (
        theirs.bytes_written > 11.9 * unit
    )  # product, thin product, scaled, sum: each three times
    assert ours.operators < theirs.operators


def test_of_the_tokens_one_copy_is_kept():
    layers, x = big()
    own = x.requires_grad_()
    weights = [p for layer in layers for p in layer.parameters()]
    kept = kept_bytes(lambda: linear.apply(layers, own)[0].sum(), besides=weights)
    assert x.nbytes <= kept < 1.1 * x.nbytes
    plain = layers_of("plain", 128)
    weights = [p for layer in plain for p in layer.parameters()]
    assert kept_bytes(lambda: linear.apply(plain, own)[0].sum(), besides=weights) == 0


def test_a_gradient_of_x_that_nobody_asks_for_is_not_computed():
    layers, x = big()

    def backward(needed: bool) -> float:
        outs = linear.apply(layers, x.clone().requires_grad_(needed))
        loss = sum(out.sum() for out in outs)
        with counted() as seen:
            loss.backward()  # type: ignore[union-attr]
        return seen.bytes_written

    assert backward(False) < backward(True) - 2 * x.nbytes


def test_a_recompute_gives_the_same_bits():
    layers, x = big()
    outs = []
    for again in (False, True):
        own = x.clone().requires_grad_()

        def compute(y: Tensor) -> Tensor:
            return torch.stack(linear.apply(layers, y)).tanh()

        out = checkpoint(compute, own, use_reentrant=False) if again else compute(own)
        outs.append(torch.autograd.grad(out.sum(), own)[0])
    assert torch.equal(*outs)


def test_who_listens_to_a_layer_is_told():
    layers = layers_of("adapted")
    heard: list[Any] = []
    for layer in (layers[0], layers[1].base):
        layer.register_forward_hook(lambda module, args, out: heard.append(module))  # type: ignore[operator]
    x = torch.randn(ROWS, WIDTH)
    outs = linear.apply(layers, x)
    assert heard == [layers[0], layers[1].base]
    for layer, out in zip(layers, outs, strict=True):
        torch.testing.assert_close(out, layer(x))


def test_a_replaced_forward_is_called():
    plain = layers_of("plain")
    plain[1].forward = MethodType(lambda self, x: x * 0 + 7, plain[1])  # type: ignore[method-assign]
    outs = linear.apply(plain, torch.randn(ROWS, WIDTH))
    assert torch.equal(outs[1], torch.full((ROWS, WIDTH), 7.0))


def test_trained_weights_get_their_gradients():
    plain = layers_of("plain")
    plain[2].requires_grad_(True)
    x = torch.randn(ROWS, WIDTH)
    sum(out.sum() for out in linear.apply(plain, x)).backward()  # type: ignore[union-attr]
    assert plain[2].weight.grad is not None


def test_other_dtypes_go_the_way_of_the_layers():
    """Without autocast, weights in float32 beside tokens in float64 are an error, as with the layers."""
    layers = layers_of("adapted")
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        linear.apply(layers, x)
    assert linear.compute([layer.affine() for layer in layers], x) is None  # type: ignore[operator]


def test_weights_that_come_and_go_are_there_when_they_are_needed():
    """The hooks of such a layer run only when it is called; its context stands for them."""
    layer = frozen()
    whole, nothing = layer.weight.data, torch.empty(0)
    seen: list[str] = []

    @contextmanager
    def resident() -> Iterator[None]:
        layer.weight.data = whole
        seen.append("there")
        yield
        layer.weight.data = nothing

    layer.weight.data = nothing

    def moves(*_: Any) -> None:
        seen.append("called")

    setattr(moves, linear.MOVES, True)
    layer.register_forward_pre_hook(moves)
    layer.resident = resident  # type: ignore[assignment]
    adapted = Adapted(layer, 1.0, WIDTH)
    x = torch.randn(ROWS, WIDTH)
    (out,) = linear.apply([adapted], x)
    expected = x @ whole.t() + layer.bias + x @ adapted.down.t() @ adapted.up.t()
    torch.testing.assert_close(out, expected)
    assert seen == ["there"]
    assert layer.weight.numel() == 0
    layer.register_forward_hook(lambda *_: seen.append("heard"))
    layer.weight.data = whole
    linear.apply([adapted], x)
    assert seen[1:] == ["called", "heard"]  # by others, so that the layer is called


def test_stored_weights_that_come_and_go_are_left_to_the_layers():
    """They would come for the attempt, and once more for the call."""
    layers, seen = layers_of("stored"), []
    for layer in layers:
        layer.base.resident = lambda: seen.append("there")  # type: ignore[union-attr, assignment]
    affines = [layer.affine() for layer in layers]  # type: ignore[operator]
    assert linear.compute(affines, torch.randn(ROWS, WIDTH)) is None
    assert seen == []


def test_tokens_that_are_none_at_all():
    layers = layers_of("mixed")
    assert [tuple(out.shape) for out in linear.apply(layers, torch.randn(0, WIDTH))] == [
        (0, WIDTH)
    ] * 3


def test_of_tokens_without_a_gradient_no_weight_is_kept():
    layers, x = big()
    factors = [p for layer in layers for p in (layer.down, layer.up)]  # type: ignore[union-attr]
    kept = kept_bytes(lambda: linear.apply(layers, x)[0].sum(), besides=factors)  # type: ignore[arg-type]
    assert kept < 1.1 * x.nbytes  # a weight is half of that
