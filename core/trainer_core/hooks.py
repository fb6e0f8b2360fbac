"""The hooks as core calls them, typed. A test keeps this equal to :mod:`trainer_core.hookspecs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer_core.types import (
    Artifact,
    Batch,
    EncoderSample,
    Exported,
    LoadedEncoder,
    LossTerm,
    ModelInputs,
    ModelSpec,
    ParameterGroup,
    Phase,
    Record,
    Residency,
    Route,
    StepOutput,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trainer_core.capabilities import Model
    from trainer_core.run import Run


class Hooks(Protocol):
    """Callers of all plugins' implementations; collected hooks return a list without None."""

    def describe_model(self, *, run: Run) -> ModelSpec | None:
        """First result."""

    def encode_batch(
        self, *, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """First result."""

    def load_model(self, *, run: Run) -> Model | None:
        """First result, wrapped."""

    def route_tokens(self, *, run: Run) -> list[Route | Sequence[Route]]:
        """Collected."""

    def offload(
        self, *, run: Run, phase: Phase | None
    ) -> list[Residency | AbstractContextManager[None]]:
        """Collected."""

    def build_optimizer(self, *, run: Run, groups: Sequence[ParameterGroup]) -> Optimizer | None:
        """First result."""

    def prepare_inputs(self, *, run: Run, inputs: ModelInputs) -> list[ModelInputs]:
        """Use ``host.calls("prepare_inputs")``: it is a chain."""

    def compute_loss(self, *, run: Run, batch: Batch, output: StepOutput) -> list[LossTerm]:
        """Use ``host.calls("compute_loss")``: core must know which plugin answered."""

    def save_weights(self, *, run: Run, folder: Path, final: bool) -> Sequence[str] | None:
        """First result."""

    def load_weights(self, *, run: Run, folder: Path) -> bool | None:
        """First result."""

    def export_weights(self, *, run: Run, path: Path, format: str, role: str) -> Exported | None:
        """First result."""

    def validate(self, *, run: Run) -> list[Sequence[Artifact]]:
        """Collected, wrapped."""

    def track(self, *, run: Run, record: Record) -> list[None]:
        """Use ``host.calls("track")``: a tracker that fails is named and never stops a run."""
