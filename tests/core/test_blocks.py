"""The block runner against oracles that do not route: bits, masks, gradients, order of visits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer_core.blocks import (
    BlockStack,
    TokenContext,
    compose_routes,
    draw_plan,
    gather_rows,
    scatter_rows,
)
from trainer_core.errors import PluginError
from trainer_core.types import ForwardPlan, Moment, Residency, Route

B, N, D = 2, 12, 8
AT = Moment(step=1)


class AttentionBlock(nn.Module):
    """One head with a position code added to the tokens, then a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ffn = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))

    def forward(self, tokens: Tensor, place: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(tokens + place).chunk(3, -1)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.out(seen)
        return tokens + self.ffn(tokens)


def call(block, tokens, per_token, shared):
    return block(tokens, per_token["place"]) * shared.get("scale", 1.0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(num_blocks: int = 5, *, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return a stack of blocks, tokens that require a gradient, and the place of each token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = nn.ModuleList(AttentionBlock() for _ in range(num_blocks)).to(dtype)
        tokens = torch.randn(B, N, D, dtype=dtype, requires_grad=True)
        place = torch.randn(1, N, D, dtype=dtype)
    return BlockStack(blocks), tokens, TokenContext(per_token={"place": place})


def route(start: int, end: int, plugin: str = "p", ids: Tensor | None = None) -> Route:
    return Route(plugin, start, end, keep=lambda *_: ids if ids is not None else some_ids())


def some_ids(count: int = 7, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, N, generator=generator).argsort(1)[:, :count].sort(1).values


def planned(*routes: Route, taps=()) -> ForwardPlan:
    return draw_plan(compose_routes(routes, 5), taps, B, N, AT)


def gradients(stack: BlockStack, tokens: Tensor, out: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), [tokens, *stack.blocks.parameters()]))


def test_without_a_plan_it_is_the_plain_loop():
    stack, tokens, context = made()
    plain = tokens
    for block in stack.blocks:
        plain = block(plain, context.per_token["place"])
    out, taps = stack.run(tokens, call=call, context=context)
    assert torch.equal(out, plain)
    assert taps == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_tokens_changes_no_bit(dtype):
    """O-T1, gradients included."""
    stack, tokens, context = made(dtype=dtype)
    everything = torch.arange(N).expand(B, N)
    plan = planned(route(0, 1, ids=everything), route(2, 4, ids=everything))
    plain, _ = stack.run(tokens, call=call, context=context)
    routed, _ = stack.run(tokens, call=call, context=context, plan=plan)
    assert torch.equal(routed, plain)
    pairs = zip(gradients(stack, tokens, routed), gradients(stack, tokens, plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_scatter_undoes_gather_and_leaves_the_rest_alone():
    """O-T2."""
    full, ids = torch.randn(B, N, 3, 2), some_ids()
    rows = gather_rows(full, ids)
    assert torch.equal(rows[1, 4], full[1, ids[1, 4]])
    assert torch.equal(scatter_rows(full, ids, rows), full)
    changed = scatter_rows(full, ids, rows + 1)
    dropped = torch.ones(B, N, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(changed[dropped], full[dropped])
    assert torch.equal(changed[~dropped].view_as(rows), rows + 1)


def test_rows_of_a_shared_table_are_gathered_for_each_sample():
    table, ids = torch.randn(1, N, 5), some_ids()
    rows = gather_rows(table, ids)
    assert all(torch.equal(rows[b], table[0, ids[b]]) for b in range(B))


def test_a_routed_block_equals_attention_with_the_dropped_keys_masked():
    """O-T3: the oracle runs all tokens and gathers nothing."""
    stack, tokens, context = made(1, dtype=torch.float64)
    ids = some_ids()
    place = context.per_token["place"]
    plan = ForwardPlan(routes=((route(0, 0), ids),))
    out, _ = stack.run(tokens, call=call, context=context, plan=plan)
    kept = torch.zeros(B, N, dtype=torch.bool).scatter(1, ids, True)
    masked = stack.blocks[0](tokens, place, kept[:, None, :])
    expected = torch.where(kept[..., None], masked, tokens)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    wrong = stack.blocks[0](gather_rows(tokens, ids), place[:, : ids.shape[1]])
    assert (wrong - gather_rows(expected, ids)).abs().max() > 1e-2  # the oracle discriminates


def test_a_dropped_token_passes_its_gradient_on_exactly():
    """O-T6, with a single route over all blocks."""
    stack, tokens, context = made()
    plan = planned(route(0, 4))
    out, _ = stack.run(tokens, call=call, context=context, plan=plan)
    upstream = torch.randn(B, N, D)
    (grad,) = torch.autograd.grad(out, tokens, upstream)
    dropped = torch.ones(B, N, dtype=torch.bool).scatter(1, some_ids(), False)
    assert torch.equal(grad[dropped], upstream[dropped])
    assert (grad != 0).any(-1).all()


@pytest.mark.parametrize("routes", [(), ((1, 3),), ((0, 1), (2, 3))])
def test_checkpointing_changes_no_bit_of_any_gradient(routes):
    """O-T6, second half."""
    stack, tokens, context = made()
    stack.blocks.train()
    plan = planned(*(route(*ends) for ends in routes), taps=(2,))
    results = []
    for policy in ("none", "full"):
        stack.policy = policy
        out, taps = stack.run(tokens, call=call, context=context, plan=plan)
        whole = out.sum(1) + taps[2].tokens.square().sum(1)
        results.append([out, *gradients(stack, tokens, whole)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("training", "grad", "computed"), [(True, True, 2), (False, True, 1), (True, False, 1)]
)
def test_blocks_are_recomputed_only_when_training_with_gradients(training, grad, computed):
    stack, tokens, context = made()
    stack.policy = "full"
    stack.blocks.train(training)
    seen = []

    def spy(block, hidden, per_token, shared):
        seen.append(hidden.shape[1])
        return call(block, hidden, per_token, shared)

    with torch.set_grad_enabled(grad):
        out, _ = stack.run(tokens, call=spy, context=context)
    if grad:
        out.sum().backward()
    assert len(seen) == computed * len(stack)


def test_each_block_sees_exactly_the_tokens_of_its_route():
    """O-T7."""
    stack, tokens, context = made()
    seen = []

    def spy(block, hidden, per_token, shared):
        seen.append((hidden.shape[1], per_token["place"].shape))
        return call(block, hidden, per_token, shared)

    plan = planned(route(1, 1, ids=some_ids(4)), route(2, 3, ids=some_ids(6)))
    stack.run(tokens, call=spy, context=context, plan=plan)
    assert [count for count, _ in seen] == [N, 4, 6, 6, N]
    assert [tuple(shape) for _, shape in seen] == [
        (1, N, D), (B, 4, D), (B, 6, D), (B, 6, D), (1, N, D)
    ]  # fmt: skip


def test_taps_yield_kept_tokens_with_ids_inside_a_route_and_all_outside():
    stack, tokens, context = made()
    ids = some_ids()
    plan = planned(route(1, 2, ids=ids), taps=(0, 1, 2, 3))
    out, taps = stack.run(tokens, call=call, context=context, plan=plan)
    assert [(i, taps[i].ids is None) for i in (0, 1, 2, 3)] == [
        (0, True), (1, False), (2, False), (3, True)
    ]  # fmt: skip
    assert taps[2].tokens.shape == (B, ids.shape[1], D)
    back = scatter_rows(taps[0].tokens, ids, taps[2].tokens)  # re-entry behind block 2
    assert torch.equal(stack.blocks[3](back, context.per_token["place"]), taps[3].tokens)
    assert torch.equal(taps[2].ids, ids)
    assert out.shape == tokens.shape


def test_shared_context_is_handed_on():
    stack, tokens, context = made(1)
    doubled = TokenContext(per_token=context.per_token, shared={"scale": 2.0})
    plain, _ = stack.run(tokens, call=call, context=context)
    assert torch.equal(stack.run(tokens, call=call, context=doubled)[0], 2 * plain)


def test_the_global_generator_is_not_touched():
    """O-T9."""
    stack, tokens, context = made()
    stack.policy = "full"
    before = torch.get_rng_state()
    out, _ = stack.run(tokens, call=call, context=context, plan=planned(route(1, 3), taps=(2,)))
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# --- plans --------------------------------------------------------------------------------------


def test_routes_are_sorted_and_may_touch():
    ordered = compose_routes([route(3, 4), route(0, 2)], 5)
    assert [(r.start, r.end) for r in ordered] == [(0, 2), (3, 4)]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 1), (0, 5), (5, 5)])
def test_a_route_outside_the_stack_is_refused_with_the_number_of_blocks(start, end):
    with pytest.raises(PluginError, match=rf"'tread' over blocks {start} to {end}.*5 blocks"):
        compose_routes([route(start, end, "tread")], 5)


def test_overlapping_routes_are_refused_naming_both():
    with pytest.raises(PluginError, match=r"'a' over blocks 1 to 3 and .*'b' over blocks 3 to 4"):
        compose_routes([route(3, 4, "b"), route(1, 3, "a")], 5)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(B, 0, dtype=torch.int64),
        torch.arange(N + 1).expand(B, -1),
        torch.arange(4).expand(1, -1),
        torch.arange(4, dtype=torch.int32).expand(B, -1),
        torch.tensor([[0, 2, 1]] * B),
        torch.tensor([[0, 1, 1]] * B),
        torch.tensor([[0, 1, N]] * B),
        torch.tensor([[-1, 1, 2]] * B),
    ],
)
def test_ids_that_would_mix_up_tokens_are_refused(ids):
    with pytest.raises(PluginError, match="'p' over blocks 0 to 1"):
        draw_plan([route(0, 1, ids=ids)], (), B, N, AT)


def test_ids_are_drawn_once_with_the_counts_and_the_moment():
    asked = []

    def keep(num_samples, num_tokens, moment):
        asked.append((num_samples, num_tokens, moment))
        return some_ids()

    stack, tokens, context = made()
    stack.policy = "full"
    plan = draw_plan([Route("p", 1, 3, keep)], (4, 0, 4), B, N, AT)
    out, _ = stack.run(tokens, call=call, context=context, plan=plan)
    out.sum().backward()
    assert asked == [(B, N, AT)]
    assert plan.taps == (0, 4)


def test_a_tap_outside_the_stack_is_refused():
    stack, tokens, context = made()
    with pytest.raises(PluginError, match="block 5; the model has blocks 0 to 4"):
        stack.run(tokens, call=call, context=context, plan=ForwardPlan(taps=(5,)))


def test_an_unknown_policy_is_refused():
    stack, _, _ = made(1)
    with pytest.raises(
        PluginError, match="'every_2' is not one of none, full, ffn, keep_attention"
    ):
        stack.policy = "every_2"


# --- residency ----------------------------------------------------------------------------------


class Recorder:
    """A residency that writes down its visits; a block computes only while it is visited."""

    def __init__(self) -> None:
        self.visits: list[str] = []
        self.open: list[int] = []

    def before(self, index: int, phase: str) -> None:
        self.visits.append(f"+{phase[0]}{index}")
        self.open.append(index)

    def after(self, index: int, phase: str) -> None:
        self.visits.append(f"-{phase[0]}{index}")
        self.open.remove(index)

    def residency(self) -> Residency:
        return Residency("offload", ("blocks",), self.before, self.after)


def watched(policy: str, *, first_needs_grad: bool):
    stack, tokens, context = made(3)
    recorder = Recorder()
    stack.policy, stack.residency = policy, recorder.residency()
    indices = {id(block): i for i, block in enumerate(stack.blocks)}

    def resident(block, hidden, per_token, shared):
        index = indices[id(block)]
        assert index in recorder.open
        out = call(block, hidden, per_token, shared)
        if out.requires_grad:
            # The hook runs when the gradient reaches the block's output.
            out.register_hook(lambda _: recorder.visits.append(f"grad{index}"))
        return out

    start = tokens if first_needs_grad else tokens.detach()
    out, _ = stack.run(start, call=resident, context=context)
    forward, recorder.visits = recorder.visits, []
    out.sum().backward()
    assert recorder.open == []
    return forward, recorder.visits


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("first_needs_grad", [True, False])
def test_a_residency_is_visited_in_order_and_in_reverse(policy, first_needs_grad):
    forward, backward = watched(policy, first_needs_grad=first_needs_grad)
    assert forward == ["+f0", "-f0", "+f1", "-f1", "+f2", "-f2"]
    visits = [v for v in backward if not v.startswith("grad")]
    recomputed = {i: ["+f" + i, "-f" + i] if policy == "full" else [] for i in "012"}
    assert visits == [
        v for i in ("2", "1", "0") for v in ("+b" + i, *recomputed[i], "-b" + i)
    ]  # fmt: skip
    for i in range(3):
        at = backward.index(f"grad{i}")
        assert backward.index(f"+b{i}") < at < backward.index(f"-b{i}")


def test_a_residency_changes_no_bit():
    stack, tokens, context = made()
    plan = planned(route(1, 3), taps=(2,))
    results = []
    for residency in (None, Recorder().residency()):
        stack.residency = residency
        out, _ = stack.run(tokens, call=call, context=context, plan=plan)
        results.append([out, *gradients(stack, tokens, out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_residency_without_gradients_is_visited_forward_only():
    stack, tokens, context = made(2)
    recorder = Recorder()
    stack.residency = recorder.residency()
    with torch.no_grad():
        stack.run(tokens, call=call, context=context)
    assert recorder.visits == ["+f0", "-f0", "+f1", "-f1"]
