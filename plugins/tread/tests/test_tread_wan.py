"""Routes of the plugin on the real block of Wan, against oracles that do not route."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trainer_core.blocks import draw_plan
from trainer_core.types import ForwardPlan, Moment, Route
from trainer_tread.hooks import Forced, Kept

testing = pytest.importorskip("trainer_wan.testing")
wan_network = pytest.importorskip("trainer_wan.network")
WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

B, FRAMES, ROWS, COLUMNS = 2, 3, 4, 4
N, AT = FRAMES * ROWS * COLUMNS, Moment(step=2)
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_checkpoint(tmp_path_factory.mktemp("wan") / "tiny", layers=LAYERS)


@pytest.fixture
def network(checkpoint: Path):
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    return wan_network.WanNetwork(model, dtype=torch.float32).train()


@pytest.fixture
def world(network) -> dict[str, torch.Tensor]:
    """x_t (2, 16, 3, 8, 8), so 48 tokens a sample; t (2,); text; every input from one generator."""
    generator = torch.Generator().manual_seed(4)
    draw = [torch.randn(*s, generator=generator) for s in ((B, 16, 3, 8, 8), (B, 7, 32))]
    return {"x_t": draw[0], "t": torch.tensor([100.0, 900.0]), "text": draw[1]}


@pytest.fixture
def planned(make_run: Callable[..., Any]) -> Callable[..., ForwardPlan]:
    """Return a maker of plans with ids drawn by the plugin: (drop_ratio, start, end) of each route."""

    def make(*routes: tuple[float, int, int], taps: tuple[int, ...] = ()) -> ForwardPlan:
        run = make_run()
        made = [
            Route("tread", a, b, keep=Kept(run, i, (a, b), drop, Forced(run)).ids)
            for i, (drop, a, b) in enumerate(routes)
        ]
        return draw_plan(made, taps, B, N, AT)

    return make


def inside(network, world, plan: ForwardPlan | None = None, **changed: torch.Tensor):
    """Return the prediction and what a spy saw of each block: (tokens in, rope, time)."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def look(_, args):
        seen.append((args[0].detach(), args[3][0], args[2]))

    hooks = [block.register_forward_pre_hook(look) for block in network.transformer.blocks]
    given = {**world, **changed}
    out, taps = network.velocity(given["x_t"], given["t"], given["text"], plan)
    for hook in hooks:
        hook.remove()
    return out, taps, seen


def gradients(network, out) -> dict[str, torch.Tensor]:
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    names, params = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weight).sum(), params)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_nothing_changes_no_bit(network, world, planned, dtype):
    """O-T1."""
    network.dtype = dtype
    plain, _, _ = inside(network, world)
    routed, _, _ = inside(network, world, planned((0.0, 1, 2)))
    assert torch.equal(routed, plain)
    wanted, found = gradients(network, plain), gradients(network, routed)
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def test_kept_tokens_equal_attention_with_the_dropped_keys_masked(network, world, planned):
    """O-T2, O-T3 over two blocks: the oracle runs all tokens and gathers neither tokens nor RoPE."""
    plan = planned((0.4, 1, 2))
    ids = plan.routes[0][1]
    kept = torch.zeros(B, N, dtype=torch.bool).scatter(1, ids, True)
    with torch.no_grad():
        _, _, seen = inside(network, world, plan)
        tokens, rope, time = *seen[1][:1], *seen[0][1:]
        assert tokens.shape[1] == ids.shape[1] == N - round(0.4 * N)
        _, _, plain = inside(network, world)
        saved = plain[1][0]  # before block 1 nothing was routed
        cos, sin = network.transformer.rope(world["x_t"])
        assert torch.equal(cos, rope)
        text = network.transformer.condition_embedder.text_embedder(world["text"])
        hidden = saved
        for index in (1, 2):
            hidden = masked(network.transformer.blocks[index], hidden, text, time, (cos, sin), kept)
    expected = torch.where(kept[..., None], hidden, saved)
    found = seen[3][0]
    assert torch.equal(found[~kept], saved[~kept]), "dropped tokens come back unchanged"
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    first = wrong_rope(network, saved, ids, text, time, (cos, sin))
    assert (first - expected[kept].view_as(first)).abs().max() > 1e-3 * expected.abs().max()


def masked(block, tokens, text, time, rope, kept):
    plain = F.scaled_dot_product_attention

    def masking(query, key, value, attn_mask=None, **options):
        own = query.shape[-2] == key.shape[-2]
        return plain(query, key, value, attn_mask=kept[:, None, None] if own else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masking)
        return block(tokens, text, time, rope)


def wrong_rope(network, tokens, ids, text, time, rope):
    """Return blocks 1 and 2 on the kept tokens with the position codes of the first K rows."""
    rows = tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))
    first = tuple(part[:, : ids.shape[1]] for part in rope)
    for index in (1, 2):
        rows = network.transformer.blocks[index](rows, text, time, first)
    return rows


def test_gathered_position_codes_are_those_of_frame_row_and_column(network, world, planned):
    """O-T4: head_dim 24 is 8 angles each of frame, row and column, cosines repeated."""
    plan = planned((0.4, 1, 2))
    ids = plan.routes[0][1]
    _, _, seen = inside(network, world, plan)
    place = [ids // (ROWS * COLUMNS), ids % (ROWS * COLUMNS) // COLUMNS, ids % COLUMNS]
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = [p[..., None].double() * frequency for p in place]
    cos = torch.cat(angles, -1).cos().repeat_interleave(2, -1)  # (B, K, 24)
    assert (seen[1][1].squeeze(2).double() - cos).abs().max() < 1e-6
    assert (37 // 16, 37 % 16 // 4, 37 % 4) == (2, 1, 1)


def test_the_order_of_kept_tokens_is_of_no_consequence(network, world, planned):
    """O-T5."""
    plan = planned((0.4, 1, 2))
    route, ids = plan.routes[0]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    out, _, _ = inside(network, world, plan)
    other, _, _ = inside(network, world, ForwardPlan(routes=((route, shuffled),)))
    assert (out - other).abs().max() < 2e-6 * out.abs().max()


def test_every_input_gets_a_gradient_and_a_dropped_one_only_its_own(network, world, planned):
    """O-T6 behind the last block: what leaves a dropped token at block 1 is what arrives at its end."""
    plan = planned((0.4, 1, 3))
    ids = plan.routes[0][1]
    kept = torch.zeros(B, N, dtype=torch.bool).scatter(1, ids, True)
    into: list[torch.Tensor] = []
    out_of: list[torch.Tensor] = []
    first = network.transformer.blocks[0]
    hook = first.register_forward_hook(lambda m, a, o: into.append(o.requires_grad_()) or None)
    norm = network.transformer.norm_out
    behind = norm.register_forward_pre_hook(lambda m, a: out_of.append(a[0]) or None)
    out, _, _ = inside(network, world, plan)
    hook.remove()
    behind.remove()
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    came, went = torch.autograd.grad((out * weight).sum(), [out_of[0], into[0]])
    assert torch.equal(went[~kept], came[~kept])
    assert not torch.equal(went[kept], came[kept])
    assert bool((went.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpointing_changes_no_bit_of_any_gradient(network, world, planned, adapter):
    """O-T6, with and without LoRA."""
    if adapter:
        with_lora(network.transformer)
    plan = planned((0.25, 0, 0), (0.5, 1, 2))
    found = []
    for policy in ("none", "full"):
        network.stack.policy = policy
        out, _, _ = inside(network, world, plan)
        params = {n: p for n, p in network.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out.square().mean(), list(params.values()))
        assert all(bool(grad.abs().sum() > 0) for grad in grads)
        found.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def with_lora(model) -> None:
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def test_each_block_sees_the_tokens_of_its_route_and_a_tap_yields_them(network, world, planned):
    """O-T7."""
    plan = planned((0.25, 0, 0), (0.5, 2, 3), taps=(0, 1, 3))
    _, taps, seen = inside(network, world, plan)
    assert [tokens.shape[1] for tokens, _, _ in seen] == [36, 48, 24, 24]
    assert torch.equal(taps[0].ids, plan.routes[0][1])
    assert taps[1].ids is None
    assert torch.equal(taps[3].ids, plan.routes[1][1])
    assert taps[3].tokens.shape == (B, 24, 48)


def test_samples_of_a_batch_do_not_mix(network, world, planned):
    plan = planned((0.5, 1, 2))
    together, _, _ = inside(network, world, plan)
    route, ids = plan.routes[0]
    for sample in range(B):
        own = {name: value[sample : sample + 1] for name, value in world.items()}
        alone, _, _ = inside(network, own, ForwardPlan(routes=((route, ids[sample : sample + 1]),)))
        assert (together[sample] - alone[0]).abs().max() < 2e-6 * alone.abs().max()


def test_token_wise_timesteps_stay_with_their_tokens(network, world, planned):
    """A time embedding for each token (a stand-in for Wan 2.2 5B) is gathered with the tokens."""
    plan = planned((0.5, 0, 3), taps=(3,))
    ids = plan.routes[0][1]
    dropped = torch.ones(B, N, dtype=torch.bool).scatter(1, ids, False)
    t = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) * 1000

    def kept(timesteps):
        return inside(network, world, plan, t=timesteps)[1][3].tokens

    alike = t[:, :1].expand(B, N).contiguous()
    per_sample = inside(network, world, plan, t=alike[:, 0])[1][3].tokens
    assert (kept(alike) - per_sample).abs().max() < 2e-6 * per_sample.abs().max()
    assert torch.equal(kept(torch.where(dropped, 5.0, t)), kept(t))
    assert not torch.equal(kept(torch.where(dropped, t, 5.0)), kept(t))


def test_blocks_that_do_nothing_make_any_route_do_nothing(network, world, planned):
    """O-T10: gates and the output of cross-attention at zero."""
    with torch.no_grad():
        for block in network.transformer.blocks:
            block.scale_shift_table.zero_()
            block.attn2.to_out[0].weight.zero_()
            block.attn2.to_out[0].bias.zero_()
        network.transformer.condition_embedder.time_proj.weight.zero_()
        network.transformer.condition_embedder.time_proj.bias.zero_()
    plain, _, _ = inside(network, world)
    routed, _, _ = inside(network, world, planned((0.9, 0, 1), (0.3, 2, 3)))
    assert torch.equal(routed, plain)


def test_token_wise_timesteps_go_with_their_tokens(network, world, planned):
    """As in TI2V 5B: the given first frame stands at timestep 0, the other tokens at the clip's."""
    generator = torch.Generator().manual_seed(6)
    first = torch.randn((B, 16, 1, 8, 8), generator=generator)
    given, plan = torch.tensor([True, False]), planned((0.4, 1, 2))
    ids, seen = plan.routes[0][1], []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[2])))
        for block in network.transformer.blocks
    ]
    network.token_wise = True
    inputs = (world["x_t"], world["t"], world["text"])
    with torch.no_grad():
        routed, _ = network.velocity(*inputs, plan, first_frame=first, given=given)
        at_zero = network._time(torch.zeros(1))[1][0]  # (6, D)
    for hook in hooks:
        hook.remove()
    (_, whole), (kept, gathered) = seen[0], seen[1]
    assert whole.shape[:3] == (B, N, 6)
    assert torch.equal(
        gathered, whole.gather(1, ids[..., None, None].expand(-1, -1, *whole.shape[2:]))
    )
    assert kept.shape[1] == ids.shape[1] < N
    in_first = ids < ROWS * COLUMNS
    stands_still = (gathered - at_zero).abs().amax((2, 3)) < 1e-6
    assert torch.equal(stands_still, in_first & given[:, None])
    assert stands_still[0].any()
    with torch.no_grad():
        plain, _ = network.velocity(*inputs, first_frame=first, given=given)
        unrouted, _ = network.velocity(
            *inputs, planned((0.0, 1, 2)), first_frame=first, given=given
        )
    assert torch.equal(plain, unrouted)
    assert not torch.equal(plain, routed)
