"""The command ``export``: load a run's model and weights, and let its plugins write them for others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.errors import CheckpointError, ConfigError, PluginError, Problem
from trainer_core.settings.explain import SETTINGS_FILE
from trainer_core.settings.load import located, resolve

if TYPE_CHECKING:
    from trainer_core.catalogue import Catalogue
    from trainer_core.plugins import Host
    from trainer_core.run import Run
    from trainer_core.settings.load import Resolved
    from trainer_core.types import Exported

FOLDER = "export"


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    folder: a run's output folder or a checkpoint. format: program that is to read it. output: the file,
    None for one below the folder. role: one expert, None for all. ema: the averaged weights.
    """

    folder: Path
    format: str
    output: Path | None = None
    role: str | None = None
    ema: bool = False


@dataclass(frozen=True)
class _Source:
    """Where the weights lie: of a run that has ended (final), or in a checkpoint."""

    folder: Path
    step: int
    is_final: bool


def settings_of(folder: Path, *, args: Sequence[str], catalogue: Catalogue) -> Resolved:
    """Return the settings of a run from the ``settings.json`` in its folder; ``args`` replace keys."""
    path = folder / SETTINGS_FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        was_set = {k: v for k, v in told["settings"].items() if k in told["origins"]}
        names = [plugin["name"] for plugin in told["plugins"]]
    except FileNotFoundError:
        text = f"holds no {SETTINGS_FILE}, so no run has written there."
        raise _refused(folder, text, "Name a run's output_dir, or a checkpoint in it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(path, f"cannot be read ({error}).", "Name another run.") from error
    on_the_cpu = ("--device", "cpu")
    keys = {**was_set, "plugins": names}
    return resolve(keys, args=(*on_the_cpu, *args), environ={}, catalogue=catalogue)


def export(
    resolved: Resolved, host: Host, wanted: Wanted, *, say: Callable[[str], None]
) -> list[Exported]:
    """Write what is wanted; say and return what was written."""
    from trainer_core.blame import blame
    from trainer_core.faults import told

    with told(), blame(host), located(resolved):
        source = _source(wanted, say)
        run = _load(resolved, host, say)
        roles = _roles(run, wanted)
        _restore(run, host, source, ema=wanted.ema)
        written = []
        for role in roles:
            path = _path(run, wanted, role)
            exported = host.hooks.export_weights(  # HOOK first result
                run=run, path=path, format=wanted.format, role=role
            )
            if exported is None:
                raise PluginError(
                    f"no plugin of the run exports what model_type {run.settings.model_type!r} trains; "
                    "a full fine-tune lies in the run's folder as a whole pipeline already"
                )
            say(
                f"{exported.path}: {role}, {exported.num_layers} layers after step {source.step}; read "
                f"back by {exported.reader}, the largest difference is {exported.error:.1g} of a change"
            )
            written.append(exported)
    return written


def _source(wanted: Wanted, say: Callable[[str], None]) -> _Source:
    from trainer_core import checkpoint as checkpoints
    from trainer_core.persistence import EVENTS, ended_at

    folder = wanted.folder
    if (folder / checkpoints.MANIFEST).is_file():
        return _Source(folder, checkpoints.read(folder).step, is_final=False)
    step = ended_at(folder / EVENTS)
    if step is not None and step >= max(checkpoints.steps(folder), default=0):
        weights = folder / "ema" if wanted.ema else folder
        if not weights.is_dir():
            raise _refused(folder, "holds no averaged weights (use_ema).", "Leave --ema out.")
        return _Source(weights, step, is_final=True)
    found = checkpoints.find(folder, "latest", say=say)
    if found is None:
        text = "holds neither final weights nor a checkpoint."
        raise _refused(folder, text, "Name a run that got as far as a checkpoint.")
    return _Source(found.folder, found.step, is_final=False)


def _load(resolved: Resolved, host: Host, say: Callable[[str], None]) -> Run:
    """Return the run with its model, as training would load it, without data."""
    from trainer_core.distributed import placement
    from trainer_core.files import digest_json
    from trainer_core.run import Run
    from trainer_core.training import checked_model

    settings = resolved.core
    run = Run(
        settings,
        placement=placement(settings),
        output_dir=Path(settings.output_dir),
        notify=say,
    )
    run.settings_digest = digest_json(resolved.fixed())
    spec = host.hooks.describe_model(run=run)  # HOOK first result
    if spec is None:
        raise PluginError("no plugin of the run provides a model")
    run.spec = spec
    run.model = checked_model(host.hooks.load_model(run=run), host)  # HOOK first result, wrapped
    return run


def _roles(run: Run, wanted: Wanted) -> list[str]:
    roles = [expert.role for expert in run.spec.experts]
    if wanted.role is None:
        if wanted.output is not None and len(roles) > 1:
            text = f"the run trains {' and '.join(roles)}, and one file holds one of them."
            way_out = f"Name one with --role, or leave --output out for {len(roles)} files."
            raise ConfigError([Problem("--output", text, str(wanted.output), way_out=way_out)])
        return roles
    if wanted.role not in roles:
        way_out = f"Name {' or '.join(roles)}."
        raise ConfigError(
            [Problem("--role", "the run does not train it.", wanted.role, way_out=way_out)]
        )
    return [wanted.role]


def _restore(run: Run, host: Host, source: _Source, *, ema: bool) -> None:
    import torch

    from trainer_core import checkpoint as checkpoints
    from trainer_core.files import read_tensors
    from trainer_core.training import trained_parameters

    if not host.hooks.load_weights(run=run, folder=source.folder):  # HOOK first result
        raise PluginError("no plugin of the run loads its weights (hook load_weights)")
    run.trained_steps = source.step
    if not ema or source.is_final:
        return
    path = source.folder / "ema.safetensors"
    if not path.is_file():
        raise _refused(source.folder, "holds no averaged weights (use_ema).", "Leave --ema out.")
    averaged = read_tensors(path)
    for name, parameter in trained_parameters(run).items():
        if name not in averaged or averaged[name].shape != parameter.shape:
            raise CheckpointError(f"{path} has no fitting {name!r}. {checkpoints.ANOTHER}")
        with torch.no_grad():
            parameter.copy_(averaged[name])


def _path(run: Run, wanted: Wanted, role: str) -> Path:
    if wanted.output is not None:
        return wanted.output
    folder = wanted.folder.resolve()
    parts = [folder.name, *(["ema"] if wanted.ema else []), wanted.format]
    if len(run.spec.experts) > 1:
        parts.append(role)
    return wanted.folder / FOLDER / f"{'-'.join(parts)}.safetensors"


def _refused(path: Path, text: str, way_out: str) -> ConfigError:
    return ConfigError([Problem("RUN", text, str(path), way_out=way_out)])
