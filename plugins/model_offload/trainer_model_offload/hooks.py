"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer_core.run import MODEL_ASIDE
from trainer_core.types import PluginInfo
from trainer_model_offload.config import ModelOffloadSettings

if TYPE_CHECKING:
    import torch

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
        """Have every weight in host memory within; parameters stay the same objects."""
        import torch

        self.move(run, torch.device("cpu"))
        try:
            yield
        finally:
            self.move(run, run.device)

    def move(self, run: Run, device: torch.device) -> None:
        """Move all roles of the model, and give back what the accelerator had for them."""
        import torch

        for module in (*run.model.networks.values(), *run.model.modules.values()):
            module.to(device)
        if device.type == "cpu" and run.device.type == "cuda":
            torch.cuda.empty_cache()
