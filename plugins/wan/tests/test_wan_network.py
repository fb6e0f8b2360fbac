"""Our forward against stock ``WanTransformer3DModel`` on the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from trainer_core.blocks import draw_plan
from trainer_core.types import ForwardPlan, Moment, Route
from trainer_wan.network import WanNetwork, call_block

BOUND = 2e-6
"""Largest difference, as a share of the expected tensor's maximum."""


def close(found, expected):
    return (found - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.fixture
def stock(checkpoint):
    return WanTransformer3DModel.from_pretrained(checkpoint / "transformer").train()


def ours(checkpoint, dtype=torch.float32):
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    return WanNetwork(model, dtype=dtype).train()


def with_lora(model):
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0", "proj_out", "time_proj", "linear_1"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


def stock_forward(model, inputs):
    text = inputs.conditioning["text_embeds"]
    return model(inputs.x_t, inputs.t, text, return_dict=False)[0]


def loss_and_gradients(module, prediction, inputs):
    loss = (prediction - inputs.target).square().mean()
    names, trained = zip(
        *((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True
    )
    return loss, dict(zip(names, torch.autograd.grad(loss, trained), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_prediction_loss_and_gradients_equal_stock(
    checkpoint, stock, make_inputs, checkpointing, adapter
):
    inputs, network = make_inputs(), ours(checkpoint)
    if adapter:
        with_lora(stock)
        with_lora(network.transformer)
    if checkpointing:
        stock.enable_gradient_checkpointing()
        network.stack.policy = "full"
    expected = stock_forward(stock, inputs)
    expected_loss, expected_grads = loss_and_gradients(stock, expected, inputs)
    found, taps = network(inputs, ForwardPlan())
    found_loss, found_grads = loss_and_gradients(network.transformer, found, inputs)

    assert taps == {}
    assert found.dtype == torch.float32
    assert close(found, expected)
    assert close(found_loss, expected_loss)
    assert found_grads.keys() == expected_grads.keys()
    assert len(found_grads) > 10
    apart = {n: (found_grads[n] - g).abs().max() for n, g in expected_grads.items()}
    largest = max(g.abs().max() for g in expected_grads.values())
    assert max(apart.values()) <= BOUND * largest
    # Gradients behind the attention to the text nearly cancel: both are this far from float64's.
    assert not [n for n, g in expected_grads.items() if apart[n] > 2e-4 * g.abs().max()]


def test_the_comparison_would_see_a_wrong_timestep(checkpoint, stock, make_inputs):
    inputs, network = make_inputs(), ours(checkpoint)
    found, _ = network.velocity(inputs.x_t, inputs.t + 1, inputs.conditioning["text_embeds"])
    assert not close(found, stock_forward(stock, inputs))


def test_token_wise_timesteps_equal_stock_and_are_gathered_in_a_route(
    checkpoint, stock, make_inputs
):
    inputs, network = make_inputs(), ours(checkpoint)
    text = inputs.conditioning["text_embeds"]
    num_tokens = 3 * 4 * 3
    t = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(0)) * 1000
    expected = stock(inputs.x_t, t, text, return_dict=False)[0]
    found, _ = network.velocity(inputs.x_t, t, text)
    assert close(found, expected)

    ids = some_ids(num_tokens, 20)
    dropped = torch.ones(2, num_tokens, dtype=torch.bool).scatter(1, ids, False)
    plan = ForwardPlan(routes=((Route("p", 0, 2, lambda *_: ids), ids),), taps=(2,))

    def kept(timesteps):
        return network.velocity(inputs.x_t, timesteps, text, plan)[1][2].tokens

    assert torch.equal(kept(torch.where(dropped, 5.0, t)), kept(t))
    assert not torch.equal(kept(torch.where(dropped, t, 5.0)), kept(t))


def test_a_route_that_keeps_every_token_changes_no_bit(checkpoint, make_inputs):
    """O-T1 on the real block."""
    inputs, network = make_inputs(), ours(checkpoint)
    ids = torch.arange(36).expand(2, -1)
    plan = draw_plan([Route("p", 1, 2, lambda *_: ids)], (), 2, 36, Moment(step=1))
    plain, _ = network(inputs, ForwardPlan())
    routed, _ = network(inputs, plan)
    assert torch.equal(plain, routed)
    grads = [loss_and_gradients(network, out, inputs)[1] for out in (plain, routed)]
    assert not [n for n in grads[0] if not torch.equal(grads[0][n], grads[1][n])]


def some_ids(num_tokens, count):
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(2, num_tokens, generator=generator).argsort(1)
    return order[:, :count].sort(1).values


def masked_block(block, tokens, text, time, rope, kept):
    """Return the block on all tokens with the dropped ones hidden as keys of self-attention."""
    import torch.nn.functional as F

    plain = F.scaled_dot_product_attention

    def masking(query, key, value, attn_mask=None, **options):
        own = query.shape[-2] == key.shape[-2]
        return plain(query, key, value, attn_mask=kept[:, None, None] if own else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masking)
        return block(tokens, text, time, rope)


def test_a_routed_block_equals_the_real_block_with_dropped_keys_masked(stock, make_inputs):
    """O-T3: the oracle gathers no position code; the classic bug, first rows of it, is far off."""
    model, inputs = stock.double(), make_inputs()
    num_tokens, count = 36, 20
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(2, num_tokens, 48, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 512, 48, generator=generator, dtype=torch.float64)
    time = torch.randn(2, 6, 48, generator=generator, dtype=torch.float64)
    cos, sin = (table.double() for table in model.rope(inputs.x_t))
    ids = some_ids(num_tokens, count)
    kept = torch.zeros(2, num_tokens, dtype=torch.bool).scatter(1, ids, True)
    block = model.blocks[0]

    from trainer_core.blocks import BlockStack, TokenContext

    network = BlockStack(torch.nn.ModuleList([block]))
    context = TokenContext({"rope_cos": cos, "rope_sin": sin}, {"text": text, "time": time})
    plan = ForwardPlan(routes=((Route("p", 0, 0, lambda *_: ids), ids),), taps=(0,))
    out, taps = network.run(tokens, call=call_block, context=context, plan=plan)
    oracle = masked_block(block, tokens, text, time, (cos, sin), kept)
    expected = torch.where(kept[..., None], oracle, tokens)
    assert (out - expected).abs().max() < 1e-6  # the block's own float32 casts
    gathered = tokens.gather(1, ids[..., None].expand(-1, -1, 48))
    wrong = block(gathered, text, time, (cos[:, :count], sin[:, :count]))
    assert (wrong - taps[0].tokens).abs().max() > 1e-2


def test_gathered_rope_is_the_analytic_one(stock, make_inputs):
    """O-T4: row j is the code of frame, row and column of token ids[j]."""
    from trainer_core.blocks import gather_rows

    rows, columns = 4, 3
    cos, sin = stock.rope(make_inputs().x_t)
    ids = some_ids(36, 20)
    for table, function in ((cos, torch.cos), (sin, torch.sin)):
        found = gather_rows(table, ids)
        for b, j in ((0, 0), (0, 7), (1, 19), (1, 3)):
            token = int(ids[b, j])
            place = (
                token // (rows * columns),
                token % (rows * columns) // columns,
                token % columns,
            )
            angles = [
                at / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8) for at in place
            ]
            expected = function(torch.cat(angles)).repeat_interleave(2).float()
            torch.testing.assert_close(found[b, j, 0], expected, rtol=0, atol=1e-7)


def test_taps_give_the_stock_blocks_outputs(checkpoint, stock, make_inputs):
    inputs, network = make_inputs(), ours(checkpoint)
    seen = {}
    for index in (0, 2):
        stock.blocks[index].register_forward_hook(
            lambda _, args, out, index=index: seen.update({index: out})
        )
    stock_forward(stock, inputs)
    _, taps = network(inputs, ForwardPlan(taps=(0, 2)))
    assert all(close(taps[i].tokens, seen[i]) for i in (0, 2))


def test_bfloat16_runs_with_float32_adapters_beside_bfloat16_weights(checkpoint, make_inputs):
    inputs = make_inputs()
    reference, _ = ours(checkpoint)(inputs, ForwardPlan())
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=torch.bfloat16)
    network = WanNetwork(with_lora(model), dtype=torch.bfloat16).train()
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            if "lora_B" in name:
                p.data.zero_()
    network.stack.policy = "full"
    found, _ = network(inputs, ForwardPlan())
    assert found.dtype == torch.float32
    assert (found - reference).abs().max() < 0.03 * reference.abs().max()
    _, grads = loss_and_gradients(network, found, inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    assert all(g.abs().max() > 0 for n, g in grads.items() if "lora_B" in n)


def test_bfloat16_products_with_all_weights_trained_in_float32(checkpoint, make_inputs):
    inputs, network = make_inputs(), ours(checkpoint, dtype=torch.bfloat16)
    reference, _ = ours(checkpoint)(inputs, ForwardPlan())
    seen = []
    network.transformer.blocks[1].attn1.to_q.register_forward_hook(
        lambda _, args, out: seen.append(out.dtype)
    )
    found, _ = network(inputs, ForwardPlan())
    assert seen == [torch.bfloat16]
    assert (found - reference).abs().max() < 0.03 * reference.abs().max()
    _, grads = loss_and_gradients(network, found, inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


def test_timesteps_stay_apart_in_bfloat16(checkpoint, make_inputs):
    """bfloat16 rounds 999 and 1000 to 1000; the embedding must still tell them apart."""
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=torch.bfloat16)
    network = WanNetwork(model, dtype=torch.bfloat16)
    seen = []
    model.condition_embedder.time_embedder.register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    inputs = make_inputs()
    for t in (999.0, 1000.0):
        with torch.no_grad():
            network.velocity(inputs.x_t, torch.full((2,), t), inputs.conditioning["text_embeds"])
    assert seen[0].dtype == torch.float32
    assert not torch.equal(*seen)
