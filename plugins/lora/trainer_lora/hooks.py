"""What the trainer sees of the plugin: a wrapper of ``load_model``, and the adapter's files."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.errors import CheckpointError, ConfigError, ModelError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import Moment, PluginInfo
from trainer_lora import adapter, files
from trainer_lora.config import LoraSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer_core.capabilities import Model
    from trainer_core.run import Run

MAIN_ROLE = "transformer"
FILE = "pytorch_lora_weights.safetensors"


def file_name(role: str) -> str:
    """Return the name of a role's file; diffusers looks for that of the main role by itself."""
    return FILE if role == MAIN_ROLE else FILE.replace(".", f"_{role}.")


class Lora:
    """Freezes the model and puts LoRA matrices into each trained role."""

    info = PluginInfo(
        summary="LoRA adapters through peft, written in the form that diffusers loads",
        settings=LoraSettings,
        provides=("adapter",),
        values=("lora_type=standard",),
        after=("quantiser",),
    )

    def __init__(self, settings: LoraSettings | None = None) -> None:
        self.settings = settings or LoraSettings()
        self.shape = adapter.Shape(
            rank=self.settings.lora_rank,
            alpha=self.settings.alpha,
            dropout_ratio=self.settings.lora_dropout,
            targets=self.settings.targets,
        )

    @hookimpl(wrapper=True)
    def load_model(self, run: Run) -> Generator[None, Model | None, Model | None]:
        """Freeze the model that lies within and put the adapter into it."""
        model = yield
        if model is None:
            return None
        if run.settings.model_type != "lora":
            run.say_once(f"lora has no effect: model_type is {run.settings.model_type}")
            return model
        for module in (*model.modules.values(), *model.networks.values()):
            module.requires_grad_(False)
        for role in _roles(model):
            self._adapt(run, model, role)
        return model

    @hookimpl
    def save_weights(self, run: Run, folder: Path) -> Sequence[str] | None:
        """Write one file per trained role; None when whole weights are trained."""
        if run.settings.model_type != "lora":
            return None
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for role in _roles(run.model):
            names.append(file_name(role))
            try:
                files.write(folder / names[-1], run.model.modules[role], self.shape)
            except files.FileError as error:
                raise CheckpointError(f"the LoRA was not written: {error}") from error
        return names

    @hookimpl
    def load_weights(self, run: Run, folder: Path) -> bool | None:
        """Restore all roles, or none of them if a file does not fit."""
        if run.settings.model_type != "lora":
            return None
        read = {}
        for role in _roles(run.model):
            path = folder / file_name(role)
            if not path.is_file():
                raise CheckpointError(f"{folder} holds no {path.name}, so it is no LoRA checkpoint")
            read[role] = self._read(path, run.model.modules[role])
        for role, tensors in read.items():
            files.restore(tensors, run.model.modules[role])
        return True

    def _read(self, path: Path, module: nn.Module) -> dict[str, torch.Tensor]:
        try:
            tensors, arguments = files.read(path)
        except files.FileError as error:
            raise CheckpointError(str(error)) from error
        wrong = files.differences(tensors, arguments, module, self.shape)
        if wrong:
            raise CheckpointError(
                f"{path} does not fit lora_rank, lora_alpha or peft_lora_target_modules of this "
                f"run: {'; '.join(wrong)}. Use the checkpoint's values, or another output_dir."
            )
        return tensors

    def _adapt(self, run: Run, model: Model, role: str) -> None:
        module = model.modules[role]
        self._check_targets(module, role)
        # The adapter starts alike on every rank and at every resume, whatever else is targeted.
        start = Moment(step=0)
        adapter.inject(
            module,
            self.shape,
            dtype=run.placement.trained_dtype,
            device=run.placement.device,
            generator=lambda layer: run.generator("lora/init", role, layer, moment=start),
        )
        network = model.networks.get(role)
        reached = set() if network is None else set(network.modules())
        lost = [name for name, layer in adapter.adapted(module) if layer not in reached]
        if network is not None and lost:
            raise ModelError(
                f"the training forward of {role} does not call the layer {lost[0]} by way of its "
                "module, so an adapter there would learn nothing; leave it out of "
                "peft_lora_target_modules"
            )

    def _check_targets(self, module: nn.Module, role: str) -> None:
        found = adapter.match(module, self.shape.targets)
        problems = []
        shown = ", ".join(adapter.endings(found.known)[:12])
        for target in found.unknown:
            problems.append((target, f"no layer of {role} is called {target} or ends with it."))
        for target, name in found.unfit.items():
            kind = type(module.get_submodule(name)).__name__
            problems.append((target, f"{name} is a {kind}; an adapter fits linear layers only."))
        if problems:
            raise ConfigError(
                Problem(
                    key="peft_lora_target_modules",
                    text=text,
                    value=target,
                    way_out=f"Linear layers are, for example: {shown}.",
                )
                for target, text in problems
            )


def _roles(model: Model) -> list[str]:
    """Return the roles that are trained, in the order of the model's experts."""
    return [expert.role for expert in model.spec.experts]
