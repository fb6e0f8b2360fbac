"""A tiny checkpoint for the session, and a run over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import ModelInputs, Moment, Placement
from trainer_wan.flavours import FLAVOURS
from trainer_wan.testing import TEXT_DIM, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wan") / "tiny", layers=3)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of tiny checkpoints by flavour; those that share a repository share one."""
    root, made = tmp_path_factory.mktemp("flavours"), {}

    def make(name: str) -> Path:
        repo = FLAVOURS[name].repo
        if repo not in made:
            made[repo] = write_checkpoint(root / repo.replace("/", "-"), flavour=name, layers=2)
        return made[repo]

    return make


@pytest.fixture
def make_run(checkpoint: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a maker of runs; keys given override the tiny checkpoint's."""

    def make(*, dtype: torch.dtype = torch.float32, **keys: Any) -> Run:
        said: list[str] = []
        run = Run(
            CoreSettings(**{"pretrained_model_name_or_path": str(checkpoint), **keys}),
            placement=Placement(torch.device("cpu"), dtype, torch.float32),
            output_dir=tmp_path / "out",
            notify=said.append,
        )
        run.said = said  # type: ignore[attr-defined]
        return run

    return make


@pytest.fixture
def make_inputs() -> Callable[..., ModelInputs]:
    """Return a maker of noised micro-batches of latents (B, 16, F, H, W), each one alike."""

    def make(shape: tuple[int, ...] = (2, 16, 3, 8, 6)) -> ModelInputs:
        generator = torch.Generator().manual_seed(5)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        x0, eps, sigma = draw(*shape), draw(*shape), torch.tensor([0.3, 0.8])[: shape[0]]
        s = sigma.view(-1, 1, 1, 1, 1)
        text = torch.zeros(shape[0], 512, TEXT_DIM)
        text[:, :9] = draw(shape[0], 9, TEXT_DIM)
        return ModelInputs(
            x0=x0,
            eps=eps,
            sigma=sigma,
            t=1000 * sigma,
            x_t=(1 - s) * x0 + s * eps,
            target=eps - x0,
            loss_weight=torch.ones(shape[0]),
            conditioning={"text_embeds": text},
            role="transformer",
            moment=Moment(step=1),
        )

    return make
