"""The rounding itself, against closed forms; then a whole Wan transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer_torchao.weights import KINDS, quantised

pytest.importorskip("torchao")
INT8, FP8 = KINDS
STEP = {INT8: 1 / 127, FP8: 1 / 8}
"""Distance of neighbouring values: of the row's largest magnitude, and (e4m3) of the value itself."""


def linear(rows: int = 48, columns: int = 64, *, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(columns, rows).to(dtype)


def examples(columns: int = 64) -> torch.Tensor:
    return torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(4))


def rounded(layer: nn.Module) -> torch.Tensor:
    """The weight that the layer computes with, (rows, columns)."""
    columns = layer.weight.shape[1]
    with torch.no_grad():
        return (layer(torch.eye(columns)) - layer.bias).T


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_rounded_to_the_nearest_value_of_its_row(kind: str):
    plain = linear()
    weight = plain.weight.detach().clone()
    error = (rounded(quantised(plain, kind=kind)) - weight).abs()
    of = weight.abs().amax(1, keepdim=True) if kind == INT8 else weight.abs()
    tiny = weight.abs().amax() * (2**-9 / 448 + 1e-5)  # subnormal values of e4m3
    assert bool((error <= of * STEP[kind] / 2 * 1.01 + tiny).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weight_gives_the_same_bits(kind: str):
    one, two = (quantised(linear(), kind=kind) for _ in range(2))
    assert torch.equal(one(examples()), two(examples()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_input_is_that_of_the_rounded_weight(kind: str):
    layer = quantised(linear(), kind=kind)
    x = examples().requires_grad_()
    layer(x).sum().backward()
    expected = rounded(layer).sum(0).expand_as(x)
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_goes_in_and_comes_out(kind: str):
    layer = quantised(linear(dtype=torch.bfloat16), kind=kind)
    out = layer(examples().bfloat16()).detach()
    assert out.dtype == torch.bfloat16
    wanted = linear()(examples()).detach()
    limit = 0.02 if kind == INT8 else 0.06
    assert float((out.float() - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize(("kind", "limit"), [(INT8, 0.005), (FP8, 0.02)])
def test_the_forward_of_wan_is_off_by_less_than_it_says(kind: str, limit: float):
    """Relative error of the whole prediction of a tiny Wan with random weights, to float32."""
    diffusers = pytest.importorskip("diffusers")
    from trainer_core.quantising import quantise_linears

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=4,
            in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
        ).eval()  # fmt: skip
        video, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32)
    stored = copy.deepcopy(plain)
    for block in stored.blocks:
        sizes = quantise_linears(
            block, lambda layer: quantised(layer, kind=kind), dtype=torch.float32
        )
        assert sizes.layers == 10
        assert sizes.after < 0.35 * sizes.before
    with torch.no_grad():
        wanted, found = (
            model(video, torch.tensor([500.0]), text, return_dict=False)[0]
            for model in (plain, stored)
        )
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < limit
