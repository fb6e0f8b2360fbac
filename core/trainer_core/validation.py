"""Samples and held-out loss on the way: called by the loop, leaves no trace in the training state."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from trainer_core.blame import note, notes
from trainer_core.errors import TrainerError
from trainer_core.files import digest_json, write_json
from trainer_core.flow import eval_inputs, squared_error
from trainer_core.media import contact_sheet, write_mp4
from trainer_core.phases import phase
from trainer_core.types import Artifact, Batch, Record

if TYPE_CHECKING:
    from trainer_core.training import Training

DONE = "artifacts.json"
T = TypeVar("T")


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
    done = _already_done(training, folder)
    if done is None:
        done = _contained(training, "validation", lambda: _render_all(training, folder, step))
        if done is None:
            return
    training.events.write("validation", step=step, files=sorted(done["files"]))
    files = {name: run.output_dir / path for name, path in done["files"].items()}
    training.trackers.put(Record("media", step=step, files=files, captions=done["captions"]))


def _contained(training: Training, what: str, work: Callable[[], T]) -> T | None:
    """Return the result of ``work``; its failure is said and, after step 0, stops nothing."""
    step = training.step
    try:
        return work()
    except Exception as error:  # whatever a plugin raises: samples are not worth a run
        if step == 0:
            raise
        note(error, training.host)
        lines = [f"{type(error).__name__}: {error}", *notes(error)]
        training.run.say(f"{what} of step {step} failed and is left out; training goes on.")
        training.run.say("\n".join(f"  {line}" for line in lines))
        training.events.write(f"{what}_failed", step=step, error=lines[0])
        return None


def _key(training: Training) -> str:
    """Return a digest of what decides the samples of a step, apart from the step itself."""
    run = training.run
    settings = {
        name: value
        for name, value in run.settings.model_dump(mode="json").items()
        if "validation" in name
    }
    prompts = [[prompt.name, prompt.text] for prompt in run.prompts]
    return digest_json([training.run_id, training.total_steps, settings, prompts])


def _already_done(training: Training, folder: Path) -> dict[str, Any] | None:
    try:
        done: dict[str, Any] = json.loads((folder / DONE).read_text())
    except (OSError, ValueError):
        return None
    output_dir = training.run.output_dir
    whole = all((output_dir / path).is_file() for path in done.get("files", {}).values())
    return done if whole and done.get("key") == _key(training) else None


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
    done = {"key": _key(training), "files": files, "captions": captions}
    write_json(folder / DONE, done)
    return done


def _variants(training: Training, step: int) -> list[tuple[str, Any]]:
    """Return (suffix of the file name, context that puts the weights in) for each set of weights."""
    choice = training.run.settings.ema_validation
    if training.ema is None or choice == "none" or step == 0:
        return [("", nullcontext())]
    averaged = ("-ema", training.ema.swapped())
    return [averaged] if choice == "ema_only" else [("", nullcontext()), averaged]


def held_out_loss(training: Training, step: int) -> None:
    """Measure the loss of every eval dataset at fixed noise and sigmas, and record the means."""
    result = _contained(training, "eval", lambda: _losses(training))
    if result is None:
        return
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


@torch.no_grad()
def _losses(training: Training) -> dict[str, float]:
    with phase(training.host, training.run, "validate"), untouched(training):
        return {
            f"eval/{dataset}": _mean_loss(training, batches)
            for dataset, batches in training.eval_batches.items()
        }


def _mean_loss(training: Training, batches: Sequence[Batch]) -> float:
    run = training.run
    losses = [
        squared_error(run.predict(inputs), inputs)
        for batch in batches
        for inputs in eval_inputs(run, batch, levels=run.settings.eval_timesteps)
    ]
    return float(torch.cat(losses).mean())
