"""On a card: the same bits, and as much memory less as the blocks that are not there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer_core.blocks import BlockStack
from trainer_core.types import Residency
from trainer_group_offload.groups import Group, frozen
from trainer_group_offload.residency import BlockResidency
from trainer_group_offload.transfers import CudaTransfers

pytestmark = pytest.mark.gpu
WIDTH, NUM = 1024, 12
BLOCK_BYTES = 4 * WIDTH * (WIDTH + 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.up = nn.Linear(WIDTH, 4, bias=False)
        self.down = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + torch.tanh(self.base(x) + self.down(self.up(x)))
        return out


def steps(device: torch.device, *, moving: bool, stream: bool) -> tuple[list[torch.Tensor], int]:
    """Return output and gradients of the last of five steps, and the peak of memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        blocks = nn.ModuleList(Block() for _ in range(NUM))
        tokens = torch.randn(2, 64, WIDTH)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    stack = BlockStack(blocks, policy="full")
    if moving:
        transfers = CudaTransfers(device, stream=stream)
        groups = [Group(frozen(block.modules()), transfers) for block in blocks]
        for parameter in blocks.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)
        mover = BlockResidency(groups, per_group=1, num_blocks=NUM, ahead=stream)
        stack.residency = Residency(
            "test", ("blocks",), mover.before, mover.after, saving=mover.saving
        )
    else:
        blocks.to(device)
    found: list[torch.Tensor] = []
    for _ in range(5):
        out, _ = stack.run(tokens.to(device), call=lambda block, x, *_: block(x))
        out.square().mean().backward()
        trained = [p for p in blocks.parameters() if p.requires_grad]
        found = [out.detach(), *(p.grad for p in trained if p.grad is not None)]
        for parameter in trained:
            parameter.grad = None
    return found, torch.cuda.max_memory_allocated(device)


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_bits_in_less_memory(stream: bool):
    device = torch.device("cuda", 0)
    wanted, whole = steps(device, moving=False, stream=False)
    got, moved = steps(device, moving=True, stream=stream)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    gone = (NUM - (2 if stream else 1)) * BLOCK_BYTES
    assert whole - moved > 0.9 * gone
