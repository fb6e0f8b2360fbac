"""Our forward of a block against diffusers' on the same weights: results, gradients, and work counted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from wan_blocks import (
    BOUND,
    HEAD,
    HEADS,
    B,
    N,
    differences,
    grads_of,
    pair,
    results,
    run_of,
    stack_of,
    world,
)

from trainer_core.blocks import BlockStack
from trainer_core.testing.counting import counted, kept_bytes, memory_of
from trainer_core.types import ForwardPlan, Route
from trainer_wan.block import take_over
from trainer_wan.fused import gated_add, head_norm, modulated_norm, rotate


@pytest.fixture(autouse=True)
def same_draws():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


CASES = {
    "plain": {},
    "one sample": {"batch": 1},
    "token-wise time": {"token_wise": True},
    "position codes of each sample, as in a route": {"rope_batch": B},
    "both": {"token_wise": True, "rope_batch": B},
    "short text": {"text": 7},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_equal_stock(case, frozen: bool):
    stock, ours = pair()
    for block in (stock, ours):
        block.requires_grad_(not frozen)
    given = world(**CASES[case])
    expected = results(stock, given)
    assert not differences(results(ours, given), expected)
    given[0] = given[0] * 1.001
    assert "out" in differences({"out": ours(*given)}, {"out": expected["out"]})


def test_image_tokens_in_front_of_the_text_are_attended_to_on_their_own():
    stock, ours = pair(added_kv_proj_dim=HEADS * HEAD)
    given = world(text=512 + 9)
    expected = results(stock, given)
    assert not differences(results(ours, given), expected)
    given[1] = given[1].detach().clone()
    given[1][:, :9] += 0.1
    assert "out" in differences({"out": ours(*given)}, {"out": expected["out"]})


def test_without_a_norm_of_its_own_in_front_of_the_text():
    with torch.random.fork_rng():
        stock = WanTransformerBlock(HEADS * HEAD, 64, HEADS, cross_attn_norm=False).train()
    ours = copy.deepcopy(stock)
    take_over([ours])
    given = world()
    assert not differences(results(ours, given), results(stock, given))


def test_adapters_with_dropout_draw_the_same_numbers():
    peft = pytest.importorskip("peft")
    names = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.5, init_lora_weights=False)
    stock, _ = pair()
    stock = peft.inject_adapter_in_model(config, stock.requires_grad_(False)).train()
    ours = copy.deepcopy(stock)
    take_over([ours])
    given, found = world(), []
    for block in (stock, ours):
        torch.manual_seed(9)
        found.append(results(block, given))
    assert len(found[0]) > 20
    assert not differences(found[1], found[0])


def test_hooks_on_layers_norms_and_the_block_are_called_and_obeyed():
    stock, ours = pair()
    names = ["attn1.to_q", "attn2.to_v", "ffn.net.2", "norm1", "norm2", "attn1.norm_k", ""]
    seen: list[list[str]] = []
    for block in (stock, ours):
        calls: list[str] = []
        seen.append(calls)
        for name in names:

            def change(_, args, out, name=name, calls=calls):
                calls.append(name)
                return out * 1.5

            block.get_submodule(name).register_forward_hook(change)
    given = world()
    assert not differences(results(ours, given), results(stock, given))
    assert seen[0] == seen[1]
    assert len(seen[0]) == len(names)


def test_a_replaced_forward_of_a_norm_or_of_an_attention_is_obeyed():
    """As LyCORIS and fused projections do."""
    stock, ours = pair()
    for block in (stock, ours):
        block.norm3.forward = lambda x, plain=block.norm3.forward: plain(x) * 1.5
        block.attn1.fuse_projections()
    given = world()
    assert not differences({"out": ours(*given)}, {"out": stock(*given)})
    for block in (stock, ours):
        block.attn2.forward = lambda x, *_: x * 0.1
    assert not differences({"out": ours(*given)}, {"out": stock(*given)})


def test_a_block_of_another_class_keeps_its_own_forward():
    class Other(WanTransformerBlock):
        def forward(self, *args):
            return args[0]

    other = Other(24, 48, 2)
    take_over([other])
    assert other(1, 2, 3, 4) == 1


@pytest.mark.parametrize("narrow", [False, True])
def test_every_operation_has_the_gradient_of_its_formula(monkeypatch, narrow):
    """In float64, against finite differences; both ways of writing a result."""
    monkeypatch.setattr("trainer_wan.fused.writes_narrow", lambda device: narrow)

    def draw(*size):
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    for size in ((2, 4), (2, 3, 4)):
        gate = draw(*size)
        assert torch.autograd.gradcheck(gated_add, (draw(2, 3, 4), draw(2, 3, 4), gate))
        norm = lambda x, a, b: modulated_norm(x, a, b, eps=1e-6)  # noqa: E731 # one line each
        assert torch.autograd.gradcheck(norm, (draw(2, 3, 4), draw(*size), draw(*size)))
    turn = (draw(1, 3, 1, 2).detach(), draw(1, 3, 1, 2).detach())
    wide = {"dtype": torch.float64}
    assert torch.autograd.gradcheck(lambda x: rotate(x, turn, **wide), draw(2, 3, 2, 4))
    for turned in (None, turn):
        norm = lambda x, w, turned=turned: head_norm(  # noqa: E731
            x, w, eps=1e-2, heads=2, turn=turned, **wide
        )
        assert torch.autograd.gradcheck(norm, (draw(2, 3, 8), draw(8)))


# --- counted --------------------------------------------------------------------------------------

WIDE, FFN_WIDE, TOKENS = 48, 280, 1024
"""Two heads of 24 and the ratio of Wan 1.3B's feed-forward (5.83); twice as many tokens as text."""


def low(token_wise: bool = False, lora: bool = False, heads: int = 2):
    """Return both blocks with bfloat16 weights as diffusers loads them, and their inputs."""
    blocks = list(pair(WIDE, FFN_WIDE, heads))
    given = world(batch=1, num_tokens=TOKENS, width=WIDE, token_wise=token_wise, head=WIDE // heads)
    given[:3] = [t.detach().bfloat16() for t in given[:3]]
    for index, block in enumerate(blocks):
        for name, p in block.named_parameters():
            kept = ("scale_shift_table", "norm1", "norm2", "norm3")
            if not any(part in kept for part in name.split(".")):
                p.data = p.data.bfloat16()
        if lora:
            peft, fused = pytest.importorskip("peft"), pytest.importorskip("trainer_lora.fused")
            config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
            block = peft.inject_adapter_in_model(config, block.requires_grad_(False)).train()
            for name, p in block.named_parameters():
                if "lora_" in name:
                    p.data = p.data.float()
            for layer in block.modules() if index else ():  # as the plugin does
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    fused.take_over(layer, "default")
            blocks[index] = block
    take_over(blocks[1:])
    given[0].requires_grad_()
    return blocks, given


def bf16(block, given):
    with torch.autocast("cpu", torch.bfloat16):
        return block(*given)


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize(
    ("lora", "written", "operators"), [(False, 0.65, 0.85), (True, 0.5, 0.7)], ids=["bare", "lora"]
)
def test_a_block_writes_less_with_fewer_operators(token_wise, lora, written, operators):
    """lora: against peft's forward of the adapters."""
    blocks, given = low(token_wise, lora)
    work = []
    for block in blocks:
        with torch.no_grad(), counted() as seen:
            bf16(block.requires_grad_(False), given)
        work.append(seen)
    assert work[1].bytes_written <= written * work[0].bytes_written
    assert work[1].operators <= operators * work[0].operators


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize(("lora", "share"), [(False, 0.92), (True, 0.75)], ids=["bare", "lora"])
def test_a_block_keeps_less_for_the_backward(token_wise, lora, share):
    blocks, given = low(token_wise, lora)
    if not lora:
        given[2].requires_grad_()
    kept = [
        kept_bytes(lambda block=block: bf16(block, given), besides=list(block.parameters()))
        for block in blocks
    ]
    assert kept[1] <= share * kept[0]


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_step_never_needs_more_memory_at_once(policy, low_precision):
    """From the allocator, forward and backward, with adapters and with all weights trained."""
    for lora in (False, True):
        blocks, given = low(lora=lora)
        if not low_precision:
            blocks = [block.float() for block in blocks]
            given[:3] = [t.detach().float() for t in given[:3]]
            given[0].requires_grad_()
        peaks = []
        for block in blocks:
            stack = BlockStack(nn.ModuleList([block]), policy=policy)

            def step(stack=stack, given=given):
                with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                    run_of(stack, given).float().square().mean().backward()

            step()  # gradients of the weights are there from now on
            peaks.append(memory_of(step).peak_bytes)
        assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize("other_devices", [False, True])
def test_bfloat16_is_no_further_from_float64_than_stock(monkeypatch, token_wise, other_devices):
    """other_devices: on the ways that a GPU's kernels ask for."""
    if other_devices:
        monkeypatch.setattr("trainer_wan.fused.mixes", lambda device: False)
        monkeypatch.setattr("trainer_wan.fused.writes_narrow", lambda device: True)
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        (stock, ours), given = low(token_wise)
        wide = copy.deepcopy(ours).double()
        exact = wide(*(t.double() for t in given[:3]), tuple(t.double() for t in given[3]))
        errors.append(
            [
                (bf16(b, given).detach().double() - exact.detach()).square().mean().sqrt()
                for b in (stock, ours)
            ]
        )
    theirs, own = torch.tensor(errors).detach().mean(0).tolist()
    assert own <= theirs * 1.002


# --- policies and chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("policy", ["full", "ffn", "keep_attention"])
def test_no_policy_changes_a_bit(policy, routed, token_wise):
    stack, given = stack_of(), world(width=48, head=24, token_wise=token_wise)
    ids = torch.arange(N).expand(B, -1)[:, ::2]
    plan = ForwardPlan(routes=((Route("p", 1, 1, lambda *_: ids), ids),)) if routed else None
    expected = grads_of(stack, given, plan=plan)
    stack.policy = policy
    found = grads_of(stack, given, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 20, 21, 100])
def test_a_feed_forward_in_chunks_of_tokens_gives_the_same(chunk, token_wise):
    stack, given = stack_of(), world(width=48, head=24, token_wise=token_wise)
    expected = grads_of(stack, given)
    for policy in ("none", "full", "ffn", "keep_attention"):
        stack.policy, stack.recomputed = policy, frozenset({"ffn"})
        found = grads_of(stack, given, chunk=chunk)
        assert (found[0] - expected[0]).abs().max() <= BOUND * expected[0].abs().max()
        apart = [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
        largest = max(e.abs().max() for e in expected)
        assert max(apart) <= 5 * BOUND * largest


def test_what_each_policy_holds_and_its_peak_with_chunks():
    """In bytes of a block's tokens, float32, 1024 of them, adapters left out: a frozen base."""
    given = world(batch=1, num_tokens=1024, width=48, head=24)
    given = [given[0], *(t.detach() for t in given[1:3]), given[3]]
    unit = given[0].numel() * 4

    def step(stack, chunk=0):
        run_of(stack, given, chunk=chunk).sum().backward()

    held, peak = {}, {}
    for policy in ("none", "full", "ffn", "keep_attention"):
        for chunk in (0, 64):
            stack = stack_of(policy, num_blocks=4)
            stack.blocks.requires_grad_(False)
            stack.recomputed = frozenset({"ffn"} if chunk else ())
            done = memory_of(lambda s=stack, c=chunk: run_of(s, given, chunk=c))
            held[policy, chunk] = done.end_bytes / unit / 4
            peak[policy, chunk] = memory_of(lambda s=stack, c=chunk: step(s, c)).peak_bytes / unit
    assert held["full", 0] < 1.3
    assert held["full", 0] + 0.9 < held["keep_attention", 0] < held["full", 0] + 1.3
    assert held["ffn", 0] < held["none", 0] - 5
    for policy in ("none", "full", "keep_attention"):
        assert peak[policy, 64] < peak[policy, 0] - 3  # a hidden layer is 5.83
    assert peak["full", 0] < peak["keep_attention", 0] < peak["ffn", 0] < peak["none", 0]


@pytest.mark.slow  # a minute on a busy machine: tracing, and generating code
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_share_their_graphs_over_all_numbers_of_tokens(backend):
    torch._dynamo.reset()
    stack = stack_of("full", num_blocks=3)
    worlds = [world(width=48, head=24, num_tokens=n) for n in (21, 40, 33)]
    expected = [grads_of(stack, given) for given in worlds]
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    for block in stack.blocks:
        block.compile(dynamic=True, backend=counter, fullgraph=True)
    graphs = []
    for given, wanted in zip(worlds, expected, strict=True):
        found = grads_of(stack, given)
        graphs.append(counter.frame_count)
        assert (found[0] - wanted[0]).abs().max() <= BOUND * wanted[0].abs().max()
        largest = max(w.abs().max() for w in wanted)
        apart = [(a - b).abs().max() for a, b in zip(found, wanted, strict=True)]
        assert max(apart) <= 5 * BOUND * largest
    assert graphs[0] < len(stack)  # one for the forward, one for the recompute
    assert graphs[0] == graphs[-1]
    torch._dynamo.reset()
