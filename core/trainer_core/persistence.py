"""What survives a run: where it starts, what a checkpoint holds, what is left at the end."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer_core import checkpoint as checkpoints
from trainer_core.answers import state_of
from trainer_core.checkpoint import Checkpoint
from trainer_core.errors import CheckpointError, ConfigError, ModelError, PluginError, Problem
from trainer_core.files import write_tensors
from trainer_core.metrics import EventLog, Trackers
from trainer_core.phases import phase
from trainer_core.training import MODEL
from trainer_core.types import Record

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.run import Run
    from trainer_core.settings.core import CoreSettings
    from trainer_core.training import Training

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Identity:
    """What a resume must find unchanged, and what is written for people.

    fixed: keys that decide what a step computes. versions: plugin → version. resolved: every key.
    write: writes settings.json into a folder.
    """

    fixed: Mapping[str, Any]
    versions: Mapping[str, str]
    resolved: Mapping[str, Any]
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Start:
    """Where a run begins: step 0, or a checkpoint."""

    checkpoint: Checkpoint | None
    run_id: str
    events: EventLog
    trackers: Trackers
    identity: Identity

    @property
    def step(self) -> int:
        """Optimiser steps that are done already."""
        return self.checkpoint.step if self.checkpoint else 0


def find_start(run: Run, identity: Identity) -> Checkpoint | None:
    """Return the checkpoint to go on from, after refusing one of another run; before heavy work."""
    resume = run.settings.resume_from_checkpoint
    found = checkpoints.find(run.output_dir, resume, say=run.say)
    if found is not None:
        check_same(found, identity, data=found.state["data"])
    return found


def check_same(checkpoint: Checkpoint, identity: Identity, *, data: str) -> None:
    """Refuse a checkpoint of other settings, plugins or data (its digest)."""
    checkpoints.check_same_run(
        checkpoint, settings=identity.fixed, plugins=identity.versions, data=data
    )


def begin(run: Run, host: Host, identity: Identity, checkpoint: Checkpoint | None) -> Start:
    """Open the event log and the trackers; nothing of an earlier run is overwritten or mixed in.

    Called when all that a resume must find unchanged was checked.
    """
    run.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.prune(run.output_dir, keep=0)
    here = checkpoint is not None and checkpoint.folder.parent.samefile(run.output_dir)
    if checkpoint is not None and here:
        _move_aside(run, [f"checkpoint-{n}" for n in _later(run, checkpoint.step)])
    else:
        _move_aside(run, _products(run))
    events = EventLog(run.output_dir / EVENTS)
    events.cut(int(checkpoint.state["log_bytes"]) if checkpoint and here else 0)
    trackers = Trackers(
        [(name, _tracker(run, track)) for name, track in host.calls("track")], say=run.say
    )
    start = Start(
        checkpoint=checkpoint,
        run_id=checkpoint.state["run_id"] if checkpoint else uuid.uuid4().hex,
        events=events,
        trackers=trackers,
        identity=identity,
    )
    identity.write(run.output_dir)
    trackers.put(Record("start", step=start.step, settings=identity.resolved))
    if start.step:
        _replay(run, start)
    return start


def _replay(run: Run, start: Start) -> None:
    """Give trackers the scalars of the checkpoint's step again: they drop what is not below it."""
    for line in (run.output_dir / EVENTS).read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "step" and event["step"] == start.step:
            scalars = {k: v for k, v in event.items() if k not in ("kind", "step")}
            start.trackers.put(Record("scalars", step=start.step, scalars=scalars))


def _tracker(run: Run, track: Callable[..., None]) -> Callable[[Record], None]:
    return lambda record: track(run=run, record=record)  # HOOK collected


def _later(run: Run, step: int) -> list[int]:
    """Return the steps of checkpoints that lie after the one that the run goes on from."""
    return [number for number in checkpoints.steps(run.output_dir) if number > step]


def _products(run: Run) -> list[str]:
    """Return what a run that got as far as a checkpoint has left in the output folder."""
    steps = checkpoints.steps(run.output_dir)
    finals = {Path(name).parts[0] for name in _final_files(run.output_dir / EVENTS)}
    if not steps and not finals:
        return []
    return [f"checkpoint-{step}" for step in steps] + [EVENTS, "validation", *sorted(finals)]


def _final_files(events: Path) -> list[str]:
    return [name for end in _ends(events) for name in end["files"]]


def ended_at(events: Path) -> int | None:
    """Return the step after which the final weights were written, None if the run has not ended."""
    ends = _ends(events)
    return int(ends[-1]["step"]) if ends else None


def _ends(events: Path) -> list[dict[str, Any]]:
    if not events.exists():
        return []
    # a line that a fault cut short has no end
    ends = [line for line in events.read_text().splitlines() if line.startswith('{"kind": "end"')]
    return [json.loads(line) for line in ends if line.endswith("}")]


def _move_aside(run: Run, names: Sequence[str]) -> None:
    there = [name for name in names if (run.output_dir / name).exists()]
    if not there:
        return
    number = 1
    while (aside := run.output_dir / f"earlier-run-{number}").exists():
        number += 1
    aside.mkdir()
    for name in there:
        (run.output_dir / name).rename(aside / name)
    run.say(f"Of an earlier run, {', '.join(there)} moved to {aside}.")


def total_steps(settings: CoreSettings, batches_per_epoch: int) -> int:
    """Return the optimiser steps of the whole run; the shorter of the two lengths bounds it."""
    steps, epochs = settings.length
    batches = (epochs or 0) * batches_per_epoch
    by_epochs = -(-batches // settings.gradient_accumulation_steps)
    bounds = [bound for bound in (steps, by_epochs) if bound]
    if not bounds:
        text = "the run has no length."
        way_out = "Set max_train_steps or num_train_epochs above 0."
        raise ConfigError([Problem("max_train_steps", text, settings.max_train_steps, "", way_out)])
    return min(bounds)


def save(training: Training) -> Path:
    """Write a checkpoint of the step just done, and drop the oldest ones beyond the limit."""
    run, host = training.run, training.host
    training.events.write("checkpoint", step=training.step)
    state = {
        "run_id": training.run_id,
        "log_bytes": training.events.flush(),
        "settings": dict(training.identity.fixed),
        "plugins": dict(training.identity.versions),
        "data": training.data_digest,
        "total_steps": training.total_steps,
    }
    with phase(host, run, "save"):
        folder = checkpoints.write(
            run.output_dir, step=training.step, state=state, fill=partial(_fill, training)
        )
    training.saved_step = training.step
    checkpoints.prune(
        run.output_dir, keep=run.settings.checkpoints_total_limit, spare=training.step
    )
    return folder


def _fill(training: Training, folder: Path) -> None:
    run, host = training.run, training.host
    _save_weights(training, folder, final=False)
    checkpoints.save_optimizer(folder, training.optimizer)
    if training.ema is not None:
        write_tensors(folder / "ema.safetensors", training.ema.state_dict())
    extra = _plugin_parameters(training)
    if extra:
        write_tensors(folder / "plugin_parameters.safetensors", extra)
    for name, plugin in host.plugins.items():
        if (state_dict := getattr(plugin, "state_dict", None)) is not None:
            checkpoints.save_plugin(folder, name, state_of(name, state_dict()))
    training.identity.write(folder)
    run.say_once(f"Checkpoints go to {run.output_dir}/checkpoint-*.")


def _save_weights(training: Training, folder: Path, *, final: bool) -> list[str]:
    run, hooks = training.run, training.host.hooks
    folder.mkdir(parents=True, exist_ok=True)
    run.trained_steps = training.step
    written = hooks.save_weights(run=run, folder=folder, final=final)  # HOOK first result
    if not written:
        raise PluginError(
            f"no plugin saved the weights of model_type {run.settings.model_type!r}; the adapter's or "
            "the model's plugin must implement save_weights"
        )
    root = folder.resolve()
    for name in written:
        if not (folder / name).is_file() or not (folder / name).resolve().is_relative_to(root):
            makers = " or ".join(plugin for plugin, _ in training.host.calls("save_weights"))
            raise PluginError(
                f"plugin {makers}: save_weights counts {name!r} as written; no such file is in {folder}"
            )
    return list(written)


def _plugin_parameters(training: Training) -> dict[str, torch.Tensor]:
    return {
        f"{group.name}/{name}": parameter
        for group in training.groups
        if group.name.split("/")[0] != MODEL
        for name, parameter in group.parameters
    }


def restore(training: Training, checkpoint: Checkpoint | None) -> None:
    """Put a checkpoint's weights and states back, bit for bit."""
    if checkpoint is None:
        return
    run, host, hooks = training.run, training.host, training.host.hooks
    try:
        loaded = hooks.load_weights(run=run, folder=checkpoint.folder)  # HOOK first result
    except ModelError as error:
        raise CheckpointError(f"{error}. {checkpoints.ANOTHER}") from error
    if not loaded:
        raise PluginError("no plugin loaded the weights of the checkpoint (hook load_weights)")
    parameters = _plugin_parameters(training)
    saved = _fitting(checkpoint, "plugin_parameters.safetensors", parameters)
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(saved[name])
    checkpoints.load_optimizer(checkpoint, training.optimizer)
    if training.ema is not None:
        shadow = training.ema.shadow
        training.ema.load_state_dict(_fitting(checkpoint, "ema.safetensors", shadow))
    for name, plugin in host.plugins.items():
        if (load := getattr(plugin, "load_state_dict", None)) is not None:
            load(checkpoints.load_plugin(checkpoint, name))
    run.say(f"Going on from {checkpoint.folder}, after step {checkpoint.step}.")


def _fitting(
    checkpoint: Checkpoint, file: str, wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, which has each wanted one in its shape: copying would broadcast."""
    saved = checkpoint.tensors(file)
    for name, value in wanted.items():
        if name not in saved or saved[name].shape != value.shape:
            raise CheckpointError(
                f"{checkpoint.folder / file} has no fitting {name!r}. {checkpoints.ANOTHER}"
            )
    return saved


def finish(training: Training) -> None:
    """Write the final weights, live and averaged, into the output folder."""
    run, host = training.run, training.host
    with phase(host, run, "save"):
        written = _save_weights(training, run.output_dir, final=True)
        if training.ema is not None:
            with training.ema.swapped():
                names = _save_weights(training, run.output_dir / "ema", final=True)
                written += [f"ema/{name}" for name in names]
    training.events.write("end", step=training.step, files=sorted(written))
    training.events.flush()
    training.finished = True
