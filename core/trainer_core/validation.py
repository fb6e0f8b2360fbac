"""Samples and held-out loss on the way: called by the loop, leaves no trace in the training state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer_core.errors import TrainerError
from trainer_core.files import write_json
from trainer_core.flow import eval_inputs, squared_error
from trainer_core.media import contact_sheet, write_mp4
from trainer_core.phases import phase
from trainer_core.types import Artifact, Batch, Record

if TYPE_CHECKING:
    from trainer_core.training import Training

DONE = "artifacts.json"


@contextmanager
def untouched(training: Training) -> Iterator[None]:
    """Restore random state, train/eval modes, ``requires_grad`` and gradients after the block."""
    networks = list(training.run.model.networks.values())
    modes = [(m, m.training) for network in networks for m in network.modules()]
    flags = [(p, p.requires_grad, p.grad) for network in networks for p in network.parameters()]
    devices = [training.run.device] if training.run.device.type == "cuda" else []
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            for module, mode in modes:
                module.training = mode
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def is_due(interval: int, step: int) -> bool:
    """Tell whether something with this interval happens after ``step``."""
    return interval > 0 and step % interval == 0


def renders(training: Training) -> bool:
    """Tell whether samples are due after the step just done (step 0: of the untrained model)."""
    settings, step = training.run.settings, training.step
    interval = settings.validation_step_interval
    if not training.run.prompts or interval == 0:
        return False
    return not settings.disable_benchmark if step == 0 else is_due(interval, step)


def measures(training: Training) -> bool:
    """Tell whether the held-out loss is due after the step just done."""
    if not training.eval_batches:
        return False
    ends = training.step in (0, training.total_steps)
    return ends or is_due(training.run.settings.eval_steps_interval, training.step)


def duties(training: Training) -> None:
    """Do what is due after the step just done: samples, held-out loss."""
    if renders(training):
        render(training, training.step)
    if measures(training):
        held_out_loss(training, training.step)


def render(training: Training, step: int) -> None:
    """Render every prompt with the weights of ``step``, write the files, tell the trackers.

    What an interrupted run has rendered for this step already is taken as it is.
    """
    run = training.run
    folder = run.output_dir / "validation" / f"step-{step:08d}"
    done = _already_done(folder, training.run_id)
    if done is None:
        try:
            done = _render_all(training, folder, step)
        except (RuntimeError, ValueError, OSError) as error:
            if step == 0:
                raise
            run.say(
                f"validation of step {step} failed and is left out; training goes on. "
                f"{type(error).__name__}: {error}"
            )
            training.events.write("validation_failed", step=step, error=str(error))
            return
    training.events.write("validation", step=step, files=sorted(done["files"]))
    files = {name: run.output_dir / path for name, path in done["files"].items()}
    training.trackers.put(Record("media", step=step, files=files, captions=done["captions"]))


def _already_done(folder: Path, run_id: str) -> dict[str, Any] | None:
    import json

    try:
        done: dict[str, Any] = json.loads((folder / DONE).read_text())
    except (OSError, ValueError):
        return None
    return done if done.get("run_id") == run_id else None


def _render_all(training: Training, folder: Path, step: int) -> dict[str, Any]:
    run = training.run
    sheet: list[Artifact] = []
    files: dict[str, str] = {}
    captions: dict[str, str] = {}
    for label, weights in _variants(training, step):
        with phase(training.host, run, "validate"), untouched(training), weights:
            results = training.host.hooks.validate(run=run)  # HOOK collected
        for artifact in (artifact for result in results for artifact in result):
            name = artifact.name + label
            path = folder / f"{name}.mp4"
            write_mp4(artifact.frames, path, fps=artifact.fps)
            files[name] = str(path.relative_to(run.output_dir))
            captions[name] = artifact.caption
            label_text = f"{name}: {artifact.caption}"
            sheet.append(Artifact(name, artifact.frames, artifact.fps, label_text))
    if sheet:
        contact_sheet(sheet, folder / "contact_sheet.png")
        path = folder / "contact_sheet.png"
        files["contact_sheet"] = str(path.relative_to(run.output_dir))
    done = {"run_id": training.run_id, "files": files, "captions": captions}
    write_json(folder / DONE, done)
    return done


def _variants(training: Training, step: int) -> list[tuple[str, Any]]:
    """Return (suffix of the file name, context that puts the weights in) for each set of weights."""
    choice = training.run.settings.ema_validation
    if training.ema is None or choice == "none" or step == 0:
        return [("", nullcontext())]
    averaged = ("-ema", training.ema.swapped())
    return [averaged] if choice == "ema_only" else [("", nullcontext()), averaged]


@torch.no_grad()
def held_out_loss(training: Training, step: int) -> dict[str, float]:
    """Measure the loss of every eval dataset at fixed noise and sigmas; record and return the means."""
    result = {}
    with phase(training.host, training.run, "validate"), untouched(training):
        for dataset, batches in training.eval_batches.items():
            result[f"eval/{dataset}"] = _mean_loss(training, batches)
    for name, value in result.items():
        if not np.isfinite(value):
            raise TrainerError(
                f"step {step}: {name} is not finite. Lower learning_rate or max_grad_norm; the last "
                "checkpoint is untouched."
            )
    training.events.write("eval", step=step, **result)
    for name, value in result.items():
        training.run.say(f"held-out loss after step {step}: {value:.4f} ({name})")
    training.trackers.put(Record("scalars", step=step, scalars=result))
    return result


def _mean_loss(training: Training, batches: Sequence[Batch]) -> float:
    run = training.run
    losses = [
        squared_error(run.predict(inputs), inputs)
        for batch in batches
        for inputs in eval_inputs(run, batch, levels=run.settings.eval_timesteps)
    ]
    return float(torch.cat(losses).mean())
