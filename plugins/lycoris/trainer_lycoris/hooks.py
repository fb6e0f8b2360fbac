"""What the trainer sees of the plugin: a wrapper of ``load_model``, and the adapter's files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.adapters import LiveLayer, facts_of, read_native, write_native
from trainer_core.errors import CheckpointError, ConfigError, ModelError, Problem
from trainer_core.files import write_json
from trainer_core.hookspecs import hookimpl
from trainer_core.settings.files import read_json
from trainer_core.types import Exported, Moment, PluginInfo
from trainer_lycoris.config import LycorisSettings
from trainer_lycoris.layers import choose
from trainer_lycoris.options import Options, OptionsError, read_options

if TYPE_CHECKING:
    from torch import nn

    from trainer_core.capabilities import Model
    from trainer_core.run import Run

MAIN_ROLE = "transformer"
FILE = "pytorch_lora_weights.safetensors"
CONFIG_FILE = "lycoris_config.json"


def file_name(role: str) -> str:
    """Return the name of a role's file."""
    return FILE if role == MAIN_ROLE else FILE.replace(".", f"_{role}.")


class Lycoris:
    """Freezes the model and puts LyCORIS adapters into each trained role."""

    info = PluginInfo(
        summary="LoKr, LoHa, LoCon and full adapters through lycoris-lora",
        settings=LycorisSettings,
        provides=("adapter",),
        values=("lora_type=lycoris",),
        after=("quantiser",),
    )

    def __init__(self, settings: LycorisSettings) -> None:
        self.settings = settings

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of ``lycoris_config``; ConfigError where it cannot be read."""
        given = self.settings.lycoris_config
        if isinstance(given, dict):
            return given
        content = read_json(Path(given), flag="lycoris_config")
        if not isinstance(content, dict):
            raise self._refused(["must hold one object, { ... }."])
        return content

    @cached_property
    def options(self) -> Options:
        """The content with its meaning checked; ConfigError with all that is wrong."""
        try:
            return read_options(self.content)
        except OptionsError as error:
            raise self._refused(error.sentences) from None

    def check(self, run: Run) -> None:
        """Refuse a wrong ``lycoris_config`` before anything is loaded."""
        if run.settings.model_type == "lora":
            _ = self.options

    @hookimpl(wrapper=True)
    def load_model(self, run: Run) -> Generator[None, Model | None, Model | None]:
        """Freeze the model that lies within and put the adapter into it."""
        model = yield
        if model is None:
            return None
        if run.settings.model_type != "lora":
            run.say_once(f"lycoris has no effect: model_type is {run.settings.model_type}")
            return model
        for module in (*model.modules.values(), *model.networks.values()):
            module.requires_grad_(False)
        for role in _roles(model):
            self._adapt(run, model, role)
        return model

    @hookimpl
    def save_weights(self, run: Run, folder: Path) -> Sequence[str] | None:
        """Write one file per trained role and the config beside; None when whole weights are trained."""
        if run.settings.model_type != "lora":
            return None
        from trainer_lycoris import files

        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for role in _roles(run.model):
            names.append(file_name(role))
            module = run.model.modules[role]
            try:
                files.write(folder / names[-1], module, self.content, self._facts(run, role))
            except CheckpointError as error:
                raise CheckpointError(f"the adapter was not written: {error}") from error
        write_json(folder / CONFIG_FILE, self.content)
        return [*names, CONFIG_FILE]

    @hookimpl
    def load_weights(self, run: Run, folder: Path) -> bool | None:
        """Restore all roles, or none of them if a file does not fit."""
        if run.settings.model_type != "lora":
            return None
        from trainer_lycoris import files

        read = {}
        for role in _roles(run.model):
            path = folder / file_name(role)
            if not path.is_file():
                raise CheckpointError(
                    f"{folder} holds no {path.name}, so it is no LyCORIS checkpoint"
                )
            found, config = files.read(path)
            wrong = files.differences(found, config, run.model.modules[role], self.content)
            if wrong:
                raise CheckpointError(
                    f"{path} does not fit lycoris_config of this run: {'; '.join(wrong)}. Use the "
                    f"{CONFIG_FILE} beside it, or another output_dir."
                )
            read[role] = found
        for role, found in read.items():
            files.restore(found, run.model.modules[role])
        return True

    @hookimpl
    def export_weights(self, run: Run, path: Path, format: str, role: str) -> Exported | None:
        """Write one role as ComfyUI reads it."""
        if run.settings.model_type != "lora":
            return None
        from trainer_lycoris import files
        from trainer_lycoris.adapter import adapted

        if format != "comfyui":
            text = "diffusers reads no LyCORIS file for this model."
            if format != "diffusers":
                text = "lycoris writes no such."
            way_out = (
                "Write --format comfyui; what the run wrote itself is lycoris-lora's own format."
            )
            raise ConfigError([Problem("--format", text, format, way_out=way_out)])
        module = run.model.modules[role]
        proofs: list[Exported] = []
        try:
            write_native(
                run,
                path,
                {name: files.stored(layer) for name, layer in adapted(module)},
                metadata={"format": "pt", **self._facts(run, role)},
                prove=lambda beside: proofs.append(read_native(run, beside, _live(module))),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path} was not written: {error}") from error
        return replace(proofs[0], path=path)

    def _facts(self, run: Run, role: str) -> dict[str, str]:
        form = self.options.form
        sizes = {} if form.algo == "full" else {"rank": form.rank, "alpha": form.scale_alpha}
        return facts_of(run, role, adapter=form.algo, **sizes)

    def _adapt(self, run: Run, model: Model, role: str) -> None:
        from trainer_lycoris import adapter

        module = model.modules[role]
        try:
            forms = choose(module, self.options)
        except OptionsError as error:
            raise self._refused(error.sentences) from None
        # The adapter starts alike on every rank and at every resume, whatever else is adapted.
        start = Moment(step=0)
        network = model.networks.get(role)
        if network is not None:
            _check_reached(module, network, forms, role)
        adapter.inject(
            module,
            forms,
            dtype=run.placement.trained_dtype,
            device=run.placement.device,
            seed=lambda layer: run.generator(
                "lycoris/init", role, layer, moment=start
            ).initial_seed(),
        )

    def _refused(self, sentences: Sequence[str]) -> ConfigError:
        given = self.settings.lycoris_config
        value = given if isinstance(given, str) else "{...}"
        return ConfigError([Problem("lycoris_config", text, value) for text in sentences])


def _check_reached(module: nn.Module, network: nn.Module, forms: Any, role: str) -> None:
    reached = set(network.modules())
    lost = [name for name in forms if module.get_submodule(name) not in reached]
    if lost:
        raise ModelError(
            f"the training forward of {role} does not call the layer {lost[0]} by way of its module, "
            "so an adapter there would learn nothing; leave it out with exclude_name in lycoris_config"
        )


def _live(module: nn.Module) -> Iterator[LiveLayer]:
    from trainer_lycoris.adapter import adapted, exact_change, frozen, parameters

    for name, layer in adapted(module):
        bias = parameters(layer).get("diff_b")
        yield LiveLayer(
            name,
            frozen(layer),
            exact_change(layer),
            None if bias is None else bias.detach().float(),
        )


def _roles(model: Model) -> list[str]:
    """Return the roles that are trained, in the order of the model's experts."""
    return [expert.role for expert in model.spec.experts]
