"""The order of residency on a device that writes it down: what is there, how much, how often copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer_core.blocks import BlockStack
from trainer_core.types import Residency
from trainer_group_offload.groups import Group, frozen
from trainer_group_offload.residency import BlockResidency

WIDTH, NUM = 8, 7
CASES = [(size, ahead) for size in (1, 2, 3, NUM) for ahead in (False, True)]


class Block(nn.Module):
    """A frozen layer and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + torch.tanh(self.base(self.norm(x)) + self.up(self.down(x)))
        return out


def call(block: nn.Module, x: Tensor, per_token: Any, shared: Any) -> Tensor:
    out: Tensor = block(x)
    return out


def made(policy: str) -> BlockStack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        blocks = nn.ModuleList(Block() for _ in range(NUM))
    if policy == "every second":
        return BlockStack(blocks, policy="full", interval=2)
    return BlockStack(blocks, policy=policy)  # type: ignore[arg-type]  # one of its words


def attach(stack: BlockStack, transfers: Any, *, size: int, ahead: bool) -> BlockResidency:
    parts = [stack.blocks[i : i + size] for i in range(0, NUM, size)]
    groups = [Group(frozen(part.modules()), transfers) for part in parts]
    mover = BlockResidency(groups, per_group=size, num_blocks=NUM, ahead=ahead)
    stack.residency = Residency("test", ("blocks",), mover.before, mover.after, saving=mover.saving)
    return mover


def tokens() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))


def step(stack: BlockStack) -> list[Tensor]:
    out, _ = stack.run(tokens(), call=call)
    out.square().mean().backward()
    grads = [p.grad for p in stack.blocks.parameters() if p.requires_grad]
    for parameter in stack.blocks.parameters():
        parameter.grad = None
    return [out.detach(), *grads]


def forward(stack: BlockStack) -> Tensor:
    with torch.no_grad():
        return stack.run(tokens(), call=call)[0]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("policy", ["none", "full", "keep_attention", "every second"])
@pytest.mark.parametrize(("size", "ahead"), CASES)
def test_a_step_is_the_same_bit_for_bit_and_holds_no_more_than_promised(
    recording, policy: str, size: int, ahead: bool
):
    """What is away cannot compute, and what was dropped is NaN: a wrong order cannot pass."""
    expected, device = step(made(policy)), recording()
    stack = made(policy)
    attach(stack, device, size=size, ahead=ahead)
    for _ in range(3):
        assert equal(step(stack), expected)
        assert device.most <= (2 if ahead else 1)
        assert torch.equal(forward(stack), expected[0])
        assert device.most <= (2 if ahead else 1)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(("size", "ahead"), CASES)
def test_nothing_is_copied_twice_in_a_pass(recording, policy: str, size: int, ahead: bool):
    """A step needs each group forward and backward; where the passes meet it stays."""
    stack, device = made(policy), recording()
    mover = attach(stack, device, size=size, ahead=ahead)
    step(stack)
    number = len(mover.groups)
    fetched = [name for what, name in device.log if what == "fetch"]
    forwards, backwards = fetched[:number], fetched[number:]
    assert len(set(forwards)) == number
    assert backwards == forwards[-2::-1], "in reverse, without the last one, which stayed"
    device.log.clear()
    step(stack)
    fetched = [name for what, name in device.log if what == "fetch"]
    assert fetched == [*forwards[1:], *backwards], "the first one stayed from the step before"


@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_next_group_is_fetched_before_this_one_computes(recording, policy: str):
    stack, device = made(policy), recording()
    mover = attach(stack, device, size=1, ahead=True)
    seen: list[tuple[int, list[int]]] = []

    def watch(number: int) -> Any:
        def look(*_: Any) -> None:
            there = [i for i, group in enumerate(mover.groups) if group.is_here]
            assert not device.unwaited - {device.log[-1][1]}, "only the coming one is on its way"
            seen.append((number, there))

        return look

    for number, block in enumerate(stack.blocks):
        block.register_forward_pre_hook(watch(number))
    step(stack)
    ahead = [(i, sorted({i, i + 1})) for i in range(NUM - 1)] + [(NUM - 1, [NUM - 1])]
    assert seen[:NUM] == ahead
    if policy == "full":
        behind = [(i, sorted({i - 1, i})) for i in range(NUM - 1, 0, -1)] + [(0, [0])]
        assert seen[NUM:] == behind, "the recompute finds the group before it on its way"


def test_without_gradients_the_first_group_is_fetched_again_for_the_next_pass(recording):
    stack, device = made("none"), recording()
    mover = attach(stack, device, size=2, ahead=True)
    forward(stack)
    assert [group.is_here for group in mover.groups] == [True, False, False, False]
    device.log.clear()
    forward(stack)
    assert sum(what == "fetch" for what, _ in device.log) == len(mover.groups)


def test_blocks_that_are_left_out_leave_nothing_behind(recording):
    """Skip-layer guidance calls some blocks only: what was fetched for others goes."""
    stack, device = made("none"), recording()
    mover = attach(stack, device, size=1, ahead=True)
    with torch.no_grad():
        for index in (0, 1, 4, 5, 0):
            mover.before(index, "forward")
            stack.blocks[index](tokens())
            mover.after(index, "forward")
    assert device.most == 2


def test_trained_weights_stay_and_learn(recording):
    stack, device = made("full"), recording()
    attach(stack, device, size=1, ahead=False)
    for block in stack.blocks:
        assert block.base.weight.is_meta, "away"
        assert not block.down.weight.is_meta
        assert block.down.weight.requires_grad
    before = [block.down.weight.clone() for block in stack.blocks]
    optimizer = torch.optim.SGD([p for p in stack.blocks.parameters() if p.requires_grad], lr=1.0)
    stack.run(tokens(), call=call)[0].square().mean().backward()
    optimizer.step()
    assert not any(
        torch.equal(block.up.weight, old) for block, old in zip(stack.blocks, before, strict=True)
    )


def test_an_error_in_a_block_leaves_a_state_that_goes_on(recording):
    stack, device = made("full"), recording()
    attach(stack, device, size=1, ahead=True)
    expected = step(made("full"))

    def fails(block: nn.Module, x: Tensor, per_token: Any, shared: Any) -> Tensor:
        if block is stack.blocks[3]:
            raise ValueError("out of memory")
        return call(block, x, per_token, shared)

    with pytest.raises(ValueError, match="out of memory"):
        stack.run(tokens(), call=fails)
    assert equal(step(stack), expected)
    assert device.most <= 2
