"""Keeps the frozen weights of one expert at a time where the work is done.

An expert of Wan 2.2 A14B is 28 GB in bfloat16. A micro-batch needs one of them, so that the other may
rest in host memory: a change costs the transfer of one expert each way. What is trained stays on the
device, with the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from trainer_wan.network import WanNetwork


class Resting:
    """Two experts of which one is awake. awake: its role, None before the first forward."""

    def __init__(self, networks: Mapping[str, WanNetwork], *, device: torch.device) -> None:
        self.networks = dict(networks)
        self.device = device
        self.rest = torch.device("cpu")
        self.awake: str | None = None
        for role, network in self.networks.items():
            network.before_forward = partial(self.wake, role)
            move_frozen(network, self.rest)

    def wake(self, role: str) -> None:
        """Bring an expert to the device after laying the other to rest: never both at once."""
        if role == self.awake:
            return
        for other, network in self.networks.items():
            if other != role:
                move_frozen(network, self.rest)
        move_frozen(self.networks[role], self.device)
        self.awake = role

    def end(self) -> None:
        """Let the networks be; the one that is awake stays so."""
        for network in self.networks.values():
            network.before_forward = None


def move_frozen(network: nn.Module, device: torch.device) -> None:
    """Move the parameters that are not trained; buffers are small and stay."""
    for parameter in network.parameters():
        if not parameter.requires_grad and parameter.device != device:
            parameter.data = parameter.data.to(device)  # host sync
