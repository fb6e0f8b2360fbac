"""The end of a feed-forward: its gradients, and what recomputes and the backward are spared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wan_blocks import differences, pair, results, run_of, stack_of, world

from trainer_core import linear
from trainer_core.blocks import BlockStack
from trainer_core.linear import Affine
from trainer_core.planner.live import Operations
from trainer_core.quantising import quantise_linears
from trainer_core.testing.counting import memory_of
from trainer_wan.block import PARTS
from trainer_wan.fused import gated_add, gated_feed_forward


@pytest.fixture(autouse=True)
def same_draws():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


class Adapted(nn.Module):
    """A layer with a low-rank adapter, by the formula."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        dtype = base.weight.dtype
        self.down = nn.Parameter(torch.randn(rank, base.in_features).to(dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, rank).to(dtype))

    def affine(self) -> Affine:
        return Affine(self.base, self.down, self.up, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down.t() @ self.up.t())


def both_ends(layer, gate: Tensor, tokens: Tensor, hidden: Tensor) -> list[list[Tensor]]:
    """Return results and gradients of our end of a feed-forward, and those of the plain operators."""
    own = layer.affine() if isinstance(layer, Adapted) else Affine(layer)
    found = []
    for fused in (True, False):
        x, h = tokens.clone().requires_grad_(), hidden.clone().requires_grad_()
        plain = gated_add(x, layer(F.gelu(h, approximate="tanh")), gate)
        out = gated_feed_forward(x, h, own, gate) if fused else plain
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        trained = [p for p in layer.parameters() if p.requires_grad]
        grads = torch.autograd.grad((out * weight).sum(), (x, h, *trained))
        found.append([out.detach(), *grads])
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wise", [False, True], ids=["gate of a sample", "gate of a token"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_end_of_a_feed_forward_is_theirs(dtype: torch.dtype, wise: bool, bias: bool):
    layer = nn.Linear(24, 12, bias=bias, dtype=dtype).requires_grad_(False)
    tokens, hidden = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    gate = torch.randn(*((2, 5, 12) if wise else (2, 12)), dtype=wide)
    for a, b in zip(*both_ends(layer, gate, tokens, hidden), strict=True):
        assert torch.equal(a, b)  # the same operators on the same numbers


@pytest.mark.parametrize("rank", [0, 2], ids=["frozen", "adapted"])
@pytest.mark.parametrize("package", ["quanto", "torchao"])
@pytest.mark.parametrize("width", [0, 1], ids=["int8", "fp8"])
def test_a_last_layer_in_8_bits_has_the_gradient_of_its_rounded_weight(package, width, rank):
    """And a recompute leaves its product out, too."""
    weights = pytest.importorskip(f"trainer_{package}.weights")
    stock, ours = pair()
    kind = weights.KINDS[width]
    for block in (stock, ours):
        block.requires_grad_(False)
        quantise_linears(
            block, lambda layer: weights.quantised(layer, kind=kind), dtype=torch.float32
        )
        if rank:
            torch.manual_seed(2)
            block.ffn.net[2] = Adapted(block.ffn.net[2], rank, 0.7)
    given = world()
    assert linear.readable(ours.ffn.net[2], like=given[0]) is not None
    expected = results(stock, given)
    assert not differences(results(ours, given), expected)
    dense = [p for p in expected if p.startswith("ffn")]
    assert len(dense) == (2 if rank else 0)
    stack, seen = BlockStack(nn.ModuleList([ours]), policy="full", parts=PARTS), []
    base = ours.ffn.net[2].base if rank else ours.ffn.net[2]
    real = type(base).forward

    def counting(layer, x):
        seen.append(layer is base)
        return real(layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base), "forward", counting)
        run_of(stack, [given[0], *(t.detach() for t in given[1:3]), given[3]]).sum().backward()
    assert sum(seen) == 1


def test_an_adapter_at_the_end_of_a_feed_forward_gets_its_gradients(monkeypatch):
    """Its activation is computed again in parts."""
    monkeypatch.setattr("trainer_wan.fused.ROWS_AT_ONCE", 3)
    base = nn.Linear(24, 12, dtype=torch.float64).requires_grad_(False)
    tokens, hidden = torch.randn(2, 5, 12).double(), torch.randn(2, 5, 24).double()
    found = both_ends(Adapted(base, 2, 0.7), torch.randn(2, 12).double(), tokens, hidden)
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 4], ids=["frozen", "adapted"])
@pytest.mark.parametrize(("policy", "fewer"), [("full", True), ("ffn", True), ("none", False)])
def test_a_recompute_leaves_out_the_last_product(policy: str, fewer: bool, rank: int):
    """Where the layer is called, a recompute does its product again for nothing."""
    given = world(width=48, head=24)
    given = [given[0], *(t.detach() for t in given[1:3]), given[3]]
    stack = stack_of(policy, num_blocks=2)
    stack.blocks.requires_grad_(False)
    if rank:
        for block in stack.blocks:
            block.ffn.net[2] = Adapted(block.ffn.net[2], rank, 1.0)
    products = []
    for called in (False, True):
        if called:  # as diffusers does
            for block in stack.blocks:
                block.ffn.net[2].register_forward_hook(lambda *_: None)
        loss = run_of(stack, given).sum()
        with Operations() as done:
            loss.backward()
        products.append(done.total)
        given[0].grad = None
    rows, out, wide = given[0].shape[:2].numel(), 48, stack.blocks[0].ffn.net[0].proj.out_features
    whole, thin = 2 * rows * out * wide, 2 * rows * rank * (wide + out)
    if not rank:
        assert products[1] - products[0] == (2 * whole if fewer else 0)
    elif fewer:  # the thin product with the activation is done again in the backward
        assert products[1] - products[0] == 2 * (whole + thin - 2 * rows * rank * wide)


@pytest.mark.parametrize("change", ["listened", "trained", "dropout", "replaced"])
def test_a_feed_forward_that_is_more_than_diffusers_is_called(change: str):
    stock, ours = pair()
    ours.requires_grad_(False)
    heard = []
    last = ours.ffn.net[2]
    if change == "listened":
        last.register_forward_hook(lambda *_: heard.append("last"))
    elif change == "trained":
        last.requires_grad_(True)
    elif change == "dropout":
        ours.ffn.net[1].p = 0.5
    else:
        ours.ffn.net[2] = nn.Sequential(last, nn.Identity())
    given = world()
    torch.manual_seed(1)
    out = ours(*given)
    if change == "dropout":
        stock.ffn.net[1].p = 0.5
        torch.manual_seed(1)
    assert not differences({"out": out}, {"out": stock(*given)})
    assert heard == (["last"] if change == "listened" else [])
    out.sum().backward()
    assert (last.weight.grad is not None) == (change == "trained")


def test_in_the_backward_the_widest_tensor_is_there_twice():
    """Stock holds three: the activation's input, its gradient, and that of its output."""
    wide, tokens = 16, 64
    found = {}
    for side, block in zip(("stock", "ours"), pair(width=24, ffn=24 * wide), strict=True):
        block.requires_grad_(False)
        given = world(num_tokens=tokens)
        given[1].requires_grad_(False)
        given[2].requires_grad_(False)

        def step(block=block, given=given) -> None:
            torch.autograd.grad(block(*given).sum(), given[0])

        step()
        found[side] = memory_of(step).peak_bytes / given[0].nbytes
    assert found["stock"] - found["ours"] > 0.8 * wide
