"""The stages of the data side over a folder of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_data import World


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset entry with all defaults."""
    world = World(tmp_path_factory.mktemp("entry"))
    world.keys["resolution"] = 480
    world.add()
    return world.backends().datasets[0]
