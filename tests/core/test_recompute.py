"""What each checkpoint policy computes twice, what it keeps, and that no gradient notices."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer_core.blocks import BlockStack, TokenContext, arrange, compose_routes, draw_plan
from trainer_core.errors import ConfigError, PluginError
from trainer_core.settings.core import CoreSettings
from trainer_core.testing.counting import memory_of
from trainer_core.testing.harness import train
from trainer_core.types import ForwardPlan, Moment, Residency, Route

B, N, D, FFN, BLOCKS = 2, 12, 8, 32, 5
POLICIES = ("none", "full", "ffn", "keep_attention")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Parted(nn.Module):
    """Attention and a feed-forward with dropout, so that a recompute must draw the same numbers."""

    def __init__(self, width: int = D, ffn: int = FFN) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.GELU(), nn.Dropout(0.2), nn.Linear(ffn, width)
        )

    def attend(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unsqueeze(1).chunk(3, -1)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        return tokens + self.out(seen.squeeze(1))

    def forward(self, tokens: Tensor, part=None) -> Tensor:
        part = part or (lambda _, compute, rows: compute(rows))
        tokens = part("attention", self.attend, tokens)
        return part("ffn", lambda rows: rows + self.ffn(rows), tokens)


def call(block, tokens, per_token, shared, **options):
    return block(tokens + per_token["place"], **options)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def made(policy: str = "none", **options):
    blocks = nn.ModuleList(Parted() for _ in range(BLOCKS))
    stack = BlockStack(blocks, policy=policy, parts=("attention", "ffn"), **options)
    return stack, torch.randn(B, N, D, requires_grad=True)


def context() -> TokenContext:
    return TokenContext(per_token={"place": torch.linspace(0, 1, N * D).view(1, N, D)})


def plan(*ends: tuple[int, int]) -> ForwardPlan:
    ids = torch.arange(N).expand(B, -1)[:, ::2]
    routes = compose_routes([Route("p", a, b, lambda *_: ids) for a, b in ends], BLOCKS)
    return draw_plan(routes, (2,), B, N, Moment(step=1))


def outcome(stack, tokens, ends=()) -> list[Tensor]:
    torch.manual_seed(5)  # the dropout
    out, taps = stack.run(tokens, call=call, context=context(), plan=plan(*ends))
    loss = out.square().sum() + taps[2].tokens.sin().sum()
    return [out, *torch.autograd.grad(loss, [tokens, *stack.blocks.parameters()])]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("ends", [(), ((1, 3),), ((0, 1), (2, 4))])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_no_policy_changes_a_bit_of_any_gradient(policy, interval, ends, resident):
    stack, tokens = made()
    expected = outcome(stack, tokens, ends)
    stack.policy, stack.interval = policy, interval
    if resident:
        stack.residency = Residency("p", (), lambda *_: None, lambda *_: None)
    found = outcome(stack, tokens, ends)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "interval", "attention", "gelu"),
    [
        ("none", 1, 5, 5),
        ("full", 1, 10, 10),
        ("full", 2, 8, 8),  # blocks 0, 2 and 4
        ("full", 5, 6, 6),
        ("ffn", 1, 5, 10),
        ("keep_attention", 1, 5, 10),
        ("keep_attention", 3, 5, 7),
    ],
)
def test_each_policy_computes_twice_what_it_says_and_nothing_else(
    policy, interval, attention, gelu
):
    stack, tokens = made(policy, interval=interval)
    with Names() as names:
        out, _ = stack.run(tokens, call=call, context=context())
        out.sum().backward()
    assert (names.seen[ATTENTION], names.seen["aten::gelu"]) == (attention, gelu)


def test_attention_to_few_keys_is_computed_again():
    """Only the product of all tokens with all tokens is worth its memory."""

    def crossed(block, tokens, per_token, shared):
        few = tokens[:, None, :3]
        seen = nn.functional.scaled_dot_product_attention(tokens[:, None], few, few)
        return block(seen.squeeze(1))

    stack, tokens = made("keep_attention")
    with Names() as names:
        out, _ = stack.run(tokens, call=crossed)
        out.sum().backward()
    assert names.seen[ATTENTION] == 5 * (2 + 1)


def test_in_evaluation_and_without_gradients_nothing_is_recomputed():
    for policy in POLICIES:
        stack, tokens = made(policy)
        stack.recomputed = frozenset({"ffn"})
        for grad, training in ((False, True), (True, False)):
            stack.blocks.train(training)
            with Names() as names, torch.set_grad_enabled(grad):
                out, _ = stack.run(tokens, call=call, context=context())
                if grad:
                    out.sum().backward()
            assert (names.seen[ATTENTION], names.seen["aten::gelu"]) == (5, 5)


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_that_a_model_always_recomputes_are_so_under_any_policy(policy):
    stack, tokens = made()
    expected = outcome(stack, tokens, ((1, 3),))
    stack.policy, stack.recomputed = policy, frozenset({"ffn"})
    found = outcome(stack, tokens, ((1, 3),))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with Names() as names:
        out, _ = stack.run(tokens, call=call, context=context())
        out.sum().backward()
    assert names.seen["aten::gelu"] >= 10


def test_a_residency_is_visited_around_the_recompute_of_a_part():
    visits: list[str] = []
    stack, tokens = made("ffn")
    stack.residency = Residency(
        "p",
        (),
        lambda i, phase: visits.append(f"+{phase[0]}{i}"),
        lambda i, phase: visits.append(f"-{phase[0]}{i}"),
    )
    out, _ = stack.run(tokens, call=call, context=context())
    forward, visits[:] = visits[:], []
    out.sum().backward()
    assert forward == [f"{sign}f{i}" for i in range(BLOCKS) for sign in "+-"]
    assert visits == [
        v for i in reversed(range(BLOCKS)) for v in (f"+b{i}", f"+f{i}", f"-f{i}", f"-b{i}")
    ]


def test_memory_held_between_forward_and_backward_falls_as_promised():
    """In units of the tokens' bytes, at the proportions of Wan 1.3B."""
    width, ffn, num_tokens = 16, 96, 512
    blocks = nn.ModuleList(Parted(width, ffn) for _ in range(4))
    tokens = torch.randn(1, num_tokens, width, requires_grad=True)
    context = TokenContext(per_token={"place": torch.zeros(1, num_tokens, width)})
    unit, held = tokens.numel() * 4 * len(blocks), {}
    for policy in POLICIES:
        stack = BlockStack(blocks, policy=policy, parts=("attention", "ffn"))
        memory = memory_of(lambda stack=stack: stack.run(tokens, call=call, context=context)[0])
        held[policy] = memory.end_bytes / unit
    assert held["full"] == pytest.approx(1, abs=0.3)  # the input of each block
    assert held["keep_attention"] == pytest.approx(held["full"] + 1, abs=0.2)  # and one output
    assert held["full"] + 3 < held["ffn"] < held["none"] - 12  # hidden layers of 6 units


def test_the_settings_decide_and_a_policy_without_its_part_is_refused():
    stack, _ = made()
    keys = {"gradient_checkpointing_policy": "ffn", "gradient_checkpointing_interval": 2}
    arrange(stack, CoreSettings(**keys))
    assert (stack.policy, stack.interval) == ("ffn", 2)
    arrange(stack, CoreSettings(**keys, gradient_checkpointing=False))
    assert stack.policy == "none"
    whole = BlockStack(stack.blocks)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing_policy = 'ffn'.*keep_attention"):
        arrange(whole, CoreSettings(**keys))
    with pytest.raises(PluginError, match="no part that is called 'ffn'"):
        whole.policy = "ffn"
    arrange(whole, CoreSettings(gradient_checkpointing_policy="keep_attention"))
    assert whole.policy == "keep_attention"


def test_a_run_takes_its_policy_from_the_keys(tmp_path):
    keys = {"gradient_checkpointing": True, "max_train_steps": 2}
    kept = {"gradient_checkpointing_policy": "keep_attention", "gradient_checkpointing_interval": 2}
    plain = train(tmp_path, plugins={}, settings=keys, output="plain")
    other = train(tmp_path, plugins={}, settings={**keys, **kept}, output="other")
    assert plain.weights() == other.weights()
    wrong = {**keys, "gradient_checkpointing_policy": "ffn"}
    with pytest.raises(ConfigError, match="gradient_checkpointing_policy"):
        train(tmp_path, plugins={}, settings=wrong, output="wrong")


def test_compiled_blocks_share_their_graphs_over_all_numbers_of_tokens(monkeypatch):
    """Without a code generator, which is the slow part and not ours."""
    torch._dynamo.reset()
    stack, _ = made()
    expected = {}
    counts = {n: torch.randn(B, n, D, requires_grad=True) for n in (12, 20, 7)}

    def grads(tokens):
        out, _ = stack.run(tokens, call=lambda block, rows, *_: block(rows))
        return [out, *torch.autograd.grad(out.square().sum(), [tokens, *stack.blocks.parameters()])]

    for block in stack.blocks:
        block.ffn[2].p = 0.0
    for n, tokens in counts.items():
        expected[n] = grads(tokens)
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **keys: plain(self, backend=backend, **keys)
    )
    arrange(stack, CoreSettings(compile_blocks=True))
    assert stack.policy == "full"
    graphs = []
    for n, tokens in counts.items():
        for found, wanted in zip(grads(tokens), expected[n], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        graphs.append(backend.frame_count)
    assert 1 <= graphs[0] < BLOCKS
    assert graphs[0] == graphs[-1]
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["ffn", "keep_attention"])
def test_policies_that_take_a_block_apart_are_refused_for_compiled_blocks(policy):
    keys = {"compile_blocks": True, "gradient_checkpointing_policy": policy}
    with pytest.raises(ValueError, match="exclude each other"):
        CoreSettings(**keys)
    CoreSettings(**keys, gradient_checkpointing=False)
