"""Trains for a few steps in this process: real clips, the real loop, a tiny model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.hookspecs import hookimpl
from trainer_core.types import Batch, ModelInputs, PluginInfo, StepOutput

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.plugins import Host
    from trainer_core.testing.recorder import HookRecorder

SIZE, FRAMES, FPS = (32, 32), 5, 16.0
CORE: Mapping[str, Any] = {
    "model_type": "full",
    "mixed_precision": "no",
    "device": "cpu",
    "resolution": SIZE[0],
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "log_step_interval": 1,
    "seed": 7,
    "gradient_checkpointing": False,
    "compress_disk_cache": False,
}


class Interrupted(Exception):
    """What ``crash_at`` raises: the run ends as if it had been killed."""


@dataclass(frozen=True)
class Draw:
    """What core drew for a micro-step, before any plugin could change it."""

    step: int
    micro: int
    samples: tuple[str, ...]
    captions: tuple[str, ...]
    sigma: tuple[float, ...]
    digest: str
    """Of noise, latents and torch's global generator."""


@dataclass(frozen=True)
class Finished:
    """What a run left. error: what ended it early. host: None where the settings were refused."""

    folder: Path
    said: tuple[str, ...]
    draws: tuple[Draw, ...]
    code: int = 0
    error: BaseException | None = None
    host: Host | None = None

    @property
    def events(self) -> list[dict[str, Any]]:
        """The event log, without wall-clock figures."""
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] != "timing"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The events of steps: loss, each term, gradient norm, learning rate."""
        return [event for event in self.events if event["kind"] == "step"]

    def weights(self) -> dict[str, bytes]:
        """Return file name → bytes of the final weights, live and averaged."""
        names = [name for name in self.events[-1]["files"] if name.endswith(".safetensors")]
        return {name: (self.folder / name).read_bytes() for name in names}

    def plugin(self, name: str) -> Any:
        """Return a plugin of the run."""
        assert self.host is not None, self.error
        return self.host.plugins[name]


@dataclass
class _Witness:
    """One of core's own plugins, so that it comes before all others. Records draws, or raises."""

    crash_at: int | None = None
    draws: list[Draw] = field(default_factory=list)
    info = PluginInfo(summary="Records what core drew")
    name = "witness"
    _inputs: ModelInputs | None = None
    _state: Any = None

    @hookimpl
    def prepare_inputs(self, inputs: ModelInputs) -> ModelInputs:
        import torch

        self._inputs, self._state = inputs, torch.get_rng_state()
        return inputs

    @hookimpl
    def compute_loss(self, batch: Batch, output: StepOutput) -> None:
        if batch.moment.step == self.crash_at:
            raise Interrupted(f"step {self.crash_at}")
        assert self._inputs is not None
        drawn = (self._inputs.eps, self._inputs.x0, self._state)
        sigma = tuple(self._inputs.sigma.tolist())
        at = batch.moment
        self.draws.append(
            Draw(at.step, at.micro, batch.sample_ids, batch.captions, sigma, _digest(*drawn))
        )


def _digest(*tensors: Tensor) -> str:
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def write_world(folder: Path, *, num_clips: int = 4, num_held_out: int = 0) -> Path:
    """Write clips and the data backend file below ``folder`` unless they are there; return the file."""
    from trainer_core.testing.clips import write_clips

    file = folder / f"backends-{num_clips}-{num_held_out}.json"
    if file.exists():
        return file
    entries = []
    for kind, count in (("video", num_clips), ("eval", num_held_out)):
        if not count:
            continue
        clips = folder / f"{kind}-{count}"
        write_clips(clips, n=count, seed=len(kind), sizes=[SIZE], frames=FRAMES, fps=FPS)
        entries.append(
            {
                "id": kind,
                "type": "local",
                "dataset_type": kind,
                "instance_data_dir": str(clips),
                "caption_strategy": "textfile",
                "video": {"num_frames": FRAMES},
            }
        )
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def train(folder: Path, **arguments: Any) -> Finished:
    """Train as :func:`attempt` does, and raise what ended the run early."""
    finished = attempt(folder, **arguments)
    if finished.error is not None:
        raise finished.error
    return finished


def attempt(
    folder: Path,
    *,
    plugins: Mapping[str, type],
    settings: Mapping[str, Any] | None = None,
    named: Sequence[str] | None = None,
    output: str = "output",
    num_clips: int = 4,
    num_held_out: int = 0,
    crash_at: int | None = None,
    recorder: HookRecorder | None = None,
) -> Finished:
    """Train with these plugins, in this process, and return what the run left.

    folder: clips, cache and outputs lie below it; runs that share it share the cache. plugins: name →
    class of everything that is "installed"; with none that provides the role model, the tiny model is
    added. named: the plugins of the run, all of them without it. settings: keys on top of
    :data:`CORE`. output: folder of the run below ``folder``; the same again resumes. crash_at: raise
    :class:`Interrupted` inside that step.
    """
    import torch

    from trainer_core.catalogue import Catalogue

    installed = dict(plugins)
    names = list(plugins if named is None else named)
    if not any(_is_model(plugin) for plugin in installed.values()):
        from trainer_core.testing.tiny import Tiny

        installed["tiny"] = Tiny
        names.append("tiny")
    backends = write_world(folder, num_clips=num_clips, num_held_out=num_held_out)
    config = {
        **CORE,
        "data_backend_config": str(backends),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / output),
        "plugins": names,
        **(settings or {}),
    }
    file = folder / f"{output}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    witness, said, threads = _Witness(crash_at), io.StringIO(), torch.get_num_threads()
    made: list[Host] = []
    code, problem = 0, None
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(said), _apart():
            code = _run(file, Catalogue.of(installed), witness, recorder, made)
    except Exception as error:
        problem = error
    finally:
        torch.set_num_threads(threads)
    lines = tuple(said.getvalue().splitlines())
    host = made[0] if made else None
    return Finished(folder / output, lines, tuple(witness.draws), code, problem, host)


def _is_model(plugin: type) -> bool:
    info = getattr(plugin, "info", None)
    return isinstance(info, PluginInfo) and "model" in info.provides


def _run(
    file: Path,
    catalogue: Any,
    witness: _Witness,
    recorder: HookRecorder | None,
    made: list[Host],
) -> int:
    from trainer_core import session
    from trainer_core.flow import Flow
    from trainer_core.optim import Optimizers
    from trainer_core.plugins import build
    from trainer_core.settings.load import resolve

    resolved = resolve(file, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(witness, Flow(), Optimizers()))
    made.append(host)
    if recorder is not None:
        recorder.attach(host)
    return session.run(resolved, host)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Leave torch's global generator as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield
