"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer_core.run import MODEL_ASIDE
from trainer_core.types import PluginInfo
from trainer_model_offload.config import ModelOffloadSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer_core.run import Run

ON_CPU = (
    "enable_model_cpu_offload has no effect here: the run is on the CPU, where all components lie in "
    "host memory"
)


class ModelOffload:
    """Keeps the model off the accelerator while another component needs it."""

    info = PluginInfo(
        summary="The model in host memory while samples are decoded",
        settings=ModelOffloadSettings,
        switch="enable_model_cpu_offload",
        conflicts=("group_offload",),
    )

    def __init__(self, settings: ModelOffloadSettings) -> None:
        self.settings = settings

    def attach(self, run: Run) -> None:
        """Offer to put the model aside; on the CPU say that there is nothing to do."""
        if run.device.type == "cpu" and run.sketch is None:
            run.say_once(ON_CPU)
            return
        run.state[MODEL_ASIDE] = lambda: self.aside(run)

    @contextmanager
    def aside(self, run: Run) -> Iterator[None]:
        """Have every weight in host memory within; parameters stay the same objects.

        Each comes back to where it was: an expert that rests in host memory stays there.
        """
        import torch

        modules = (*run.model.networks.values(), *run.model.modules.values())
        every = [part for module in modules for part in (*module.parameters(), *module.buffers())]
        parts = list({id(part): part for part in every}.values())
        devices = [part.device for part in parts]
        self.move(parts, [torch.device("cpu")] * len(parts))
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # gives back what the accelerator had for them
        try:
            yield
        finally:
            self.move(parts, devices)

    def move(self, parts: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
        """Move each part to its device."""
        for part, device in zip(parts, devices, strict=True):
            part.data = part.data.to(device)
