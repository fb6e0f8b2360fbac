"""What every test of the repository gets: one thread, and runs without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Placement


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sum in the same order on every machine, and leave the other cores to the other workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Return a maker of runs of one process; ``said`` holds what they said."""

    def make(*, rank: int = 0, **keys: Any) -> Run:
        said: list[str] = []
        run = Run(
            CoreSettings(**keys),
            placement=Placement(torch.device("cpu"), torch.float32, torch.float32),
            output_dir=tmp_path / "out",
            rank=rank,
            notify=said.append,
        )
        run.said = said  # type: ignore[attr-defined]
        return run

    return make
