"""What the trainer sees of the plugin: a wrapper of ``load_model``, and the adapter's files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.adapters import (
    LiveLayer,
    facts_of,
    native_names,
    read_by_library,
    read_native,
    readers,
    write_native,
)
from trainer_core.capabilities import NativeNames
from trainer_core.changes import by_layer
from trainer_core.errors import CheckpointError, ConfigError, ModelError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import Exported, Moment, PluginInfo
from trainer_lora import adapter, files, start
from trainer_lora.checks import check_comfyui, check_targets
from trainer_lora.config import LoraSettings, whole
from trainer_lora.shape import Shape

if TYPE_CHECKING:
    from torch import nn

    from trainer_core.capabilities import Model
    from trainer_core.run import Run

MAIN_ROLE = "transformer"
FILE = "pytorch_lora_weights.safetensors"
FORMATS = ("diffusers", "comfyui")


def file_name(role: str) -> str:
    """Return the name of a role's file; diffusers looks for that of the main role by itself."""
    return FILE if role == MAIN_ROLE else FILE.replace(".", f"_{role}.")


class Lora:
    """Freezes the model and puts LoRA matrices into each trained role."""

    info = PluginInfo(
        summary="LoRA and DoRA through peft, in files that diffusers and ComfyUI load",
        settings=LoraSettings,
        provides=("adapter",),
        values=("lora_type=standard",),
        after=("quantiser",),
    )

    def __init__(self, settings: LoraSettings | None = None) -> None:
        self.settings = settings or LoraSettings()
        alpha = self.settings.lora_alpha
        self.shape = Shape(
            rank=self.settings.lora_rank,
            alpha=None if alpha is None else whole(alpha),
            dropout_ratio=self.settings.lora_dropout,
            targets=self.settings.targets,
            ranks=self.settings.lora_rank_pattern or {},
            alphas={k: whole(v) for k, v in (self.settings.lora_alpha_pattern or {}).items()},
            dropouts=self.settings.lora_dropout_pattern or {},
            dora=self.settings.use_dora,
        )

    def check(self, run: Run) -> None:
        """Refuse a file to start from that is not there."""
        path = self.settings.init_lora
        if run.settings.model_type == "lora" and path is not None and not Path(path).is_file():
            raise _unfit(path, "there is no such file.", "Correct the path, or remove the key.")

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
        if self.settings.init_lora is not None:
            self._start(run, model, self.settings.init_lora)
        return model

    @hookimpl
    def save_weights(self, run: Run, folder: Path) -> Sequence[str] | None:
        """Write one file per trained role; None when whole weights are trained."""
        if run.settings.model_type != "lora":
            return None
        names = []
        for role in _roles(run.model):
            names.append(file_name(role))
            try:
                form = self.settings.lora_format
                self._write(run, folder / names[-1], role, form, by_library=form == "comfyui")
            except (files.FileError, CheckpointError) as error:
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
            read[role] = self._read(path, run.model, role)
        for role, content in read.items():
            files.restore(content.tensors, run.model.modules[role])
        return True

    @hookimpl
    def export_weights(self, run: Run, path: Path, format: str, role: str) -> Exported | None:
        """Write one role as diffusers or ComfyUI reads it; a DoRA only as ComfyUI does."""
        if run.settings.model_type != "lora":
            return None
        if format not in FORMATS:
            way_out = f"Write one of {', '.join(FORMATS)}."
            raise ConfigError(
                [Problem("--format", "lora writes no such.", format, way_out=way_out)]
            )
        if format == "diffusers" and self.shape.dora:
            text = (
                "diffusers keeps DoRA's magnitudes in peft's own names only, which no other reads."
            )
            way_out = f"Give diffusers the run's own {file_name(role)}; write --format comfyui."
            raise ConfigError([Problem("--format", text, format, way_out=way_out)])
        try:
            return self._write(run, path, role, format)
        except (files.FileError, CheckpointError) as error:
            raise CheckpointError(f"{path} was not written: {error}") from error

    def _write(
        self, run: Run, path: Path, role: str, format: str, *, by_library: bool = True
    ) -> Exported:
        """Write and prove a role's file: by the formula, and by the model's library where it can."""
        module = run.model.modules[role]
        facts = facts_of(
            run,
            role,
            adapter="DoRA" if self.shape.dora else "LoRA",
            rank=self.shape.rank,
            alpha=self.shape.rank if self.shape.alpha is None else self.shape.alpha,
        )
        proofs: list[Exported] = []

        def prove(beside: Path) -> None:
            if format == "comfyui":
                proofs.append(read_native(run, beside, _live(module)))
            else:
                error = files.verify(beside, module, self.shape)
                layers = sum(1 for _ in adapter.adapted(module))
                proofs.append(Exported(beside, layers, error, "the papers' formulas"))
            if by_library and not self.shape.dora and isinstance(run.model, NativeNames):
                proofs.append(read_by_library(run, beside, _live(module)))

        if format == "comfyui":
            arguments = files.packed(module, self.shape)
            metadata = {"format": "pt", **facts, files.NATIVE_METADATA: arguments}
            layers = files.native_tensors(module, self.shape)
            write_native(run, path, layers, metadata=metadata, prove=prove)
        else:
            files.write(path, module, self.shape, facts, prove=prove)
        return replace(
            max(proofs, key=lambda proof: proof.error), path=path, reader=readers(proofs)
        )

    def _read(self, path: Path, model: Model, role: str) -> files.Content:
        module = model.modules[role]
        try:
            content = files.read(path)
            if content.comfyui and isinstance(model, NativeNames):
                names = {name: model.native_name(name) for name, _ in adapter.adapted(module)}
                content = files.in_our_names(content, names)
        except files.FileError as error:
            raise CheckpointError(str(error)) from error
        wrong = files.differences(content.tensors, content.arguments, module, self.shape)
        if wrong:
            raise CheckpointError(
                f"{path} does not fit lora_rank, lora_alpha or peft_lora_target_modules of this "
                f"run: {'; '.join(wrong)}. Use the checkpoint's values, or another output_dir."
            )
        return content

    def _adapt(self, run: Run, model: Model, role: str) -> None:
        module = model.modules[role]
        check_targets(module, self.shape, role)
        if self.settings.lora_format == "comfyui":
            native_names(model, key="lora_format")
            check_comfyui(module, self.shape)
        # The adapter starts alike on every rank and at every resume, whatever else is targeted.
        moment = Moment(step=0)
        adapter.inject(
            module,
            self.shape,
            dtype=run.placement.trained_dtype,
            device=run.placement.device,
            generator=lambda layer: run.generator("lora/init", role, layer, moment=moment),
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

    def _start(self, run: Run, model: Model, path: str) -> None:
        """Put the weights of ``init_lora`` into every role, and say what it lacks."""
        try:
            given = _given(Path(path), model)
            for role in _roles(model):
                fresh = start.start_from(given, model.modules[role], self.shape)
                lacks = f", which lacks {fresh[0]} and {len(fresh) - 1} more" if fresh else ""
                run.say(f"{role} starts from {len(given)} layers of {path}{lacks}.")
        except start.UnfitError as error:
            raise _unfit(path, str(error), error.way_out) from error
        except (files.FileError, CheckpointError) as error:
            raise _unfit(path, f"{error}.", "Name a LoRA in safetensors.") from error


def _given(path: Path, model: Model) -> dict[str, start.Given]:
    """Return what a LoRA file has for each layer, under any names that the model or its library knows."""
    content = files.read(path)
    if content.comfyui and isinstance(model, NativeNames):
        layers = by_layer(content.tensors)
        back = model.layers_of(tuple(layers))
        return start.native_layers({back[name]: parts for name, parts in layers.items()})
    if any(".lora_A." in name for name in content.tensors) or not isinstance(model, NativeNames):
        return start.given_layers(content)
    pairs = model.read_lora(path)
    return {name: start.Given(a, b, 1.0) for name, (a, b) in pairs.items()}


def _live(module: nn.Module) -> Iterator[LiveLayer]:
    for name, layer in adapter.adapted(module):
        yield LiveLayer(name, adapter.frozen(layer), adapter.change(layer))


def _roles(model: Model) -> list[str]:
    """Return the roles that are trained, in the order of the model's experts."""
    return [expert.role for expert in model.spec.experts]


def _unfit(path: str, text: str, way_out: str) -> ConfigError:
    return ConfigError([Problem("init_lora", text, path, way_out=way_out)])
