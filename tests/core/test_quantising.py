"""Where blocks lie while they are quantised."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from trainer_core.quantising import blocks_on_the_host
from trainer_core.types import Placement


def test_in_a_plan_blocks_belong_on_the_device():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    placement = Placement(cuda, torch.bfloat16, torch.float32, blocks=cpu)
    for sketch, home in ((None, cpu), (object(), cuda)):
        run = SimpleNamespace(placement=placement, sketch=sketch)
        with blocks_on_the_host(run) as found:
            assert run.placement.blocks == cpu
            assert found == home
        assert run.placement is placement
