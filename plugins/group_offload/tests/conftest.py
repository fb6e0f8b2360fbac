"""A device on the CPU that writes down what comes and goes, and spoils what has gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_group_offload import GroupOffload


class Recording:
    """Transfers on the CPU. While a weight is away nothing can be computed with it.

    log: ("fetch" or "drop", address of the first home). there: homes on the device now; most: their
    largest number so far. spoils: fill what was dropped with NaN, so that whoever still reads it shows.
    """

    def __init__(self, *, spoils: bool = True) -> None:
        self.spoils = spoils
        self.log: list[tuple[str, int]] = []
        self.waits = 0
        self.there: dict[int, int] = {}
        self.most = 0
        self.unwaited: set[int] = set()

    def home(self, leaf: Tensor) -> Tensor:
        return leaf.detach().clone()

    def away(self, leaf: Tensor) -> Tensor:
        return leaf.to("meta")

    def fetch(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        copies, name = [home.clone() for home in homes], homes[0].data_ptr()
        assert name not in self.there.values(), "it is there already"
        self.there[copies[0].data_ptr()] = name
        self.most = max(self.most, len(self.there))
        self.log.append(("fetch", name))
        self.unwaited.add(name)
        return copies, name

    def wait(self, ticket: Any) -> None:
        self.unwaited.discard(ticket)

    def drop(self, copies: Sequence[Tensor]) -> None:
        self.log.append(("drop", self.there.pop(copies[0].data_ptr())))
        for copy in copies if self.spoils else ():
            if copy.is_floating_point():
                copy.fill_(torch.nan)


class OnCpu(GroupOffload):
    """The plugin with that device in place of CUDA."""

    spoils = True

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.device = Recording(spoils=self.spoils and settings.group_offload_type == "block_level")

    def acts(self, run: Any) -> bool:
        return True

    def transfers(self, run: Any) -> Recording:
        return self.device


@pytest.fixture
def recording() -> type[Recording]:
    return Recording


@pytest.fixture
def on_cpu() -> type[OnCpu]:
    return OnCpu
