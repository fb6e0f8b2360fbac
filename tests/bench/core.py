"""Measures what core costs in a step: ``python tests/bench/core.py FOLDER`` writes core.json.

The model does nothing (one parameter, its forward returns a constant times it), four plugins are
loaded (a loss, a ``prepare_inputs``, an ``offload`` context, a tracker) and batches lie in memory, so
that what is left of a step is core, the hooks and the least work that torch can do. The run is the real
``loop.train``. First whole steps are timed, from batch to batch; then the parts of a step get clocks
that tell their shares. Processor time stands beside the clock's, since it stays comparable on a machine
that others use too.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer_core import LossTerm, PluginInfo, hookimpl, loop, persistence, reporting
from trainer_core.flow import Flow, SigmaSampler
from trainer_core.metrics import EventLog, Meter, Trackers
from trainer_core.optim import Optimizers
from trainer_core.persistence import Identity
from trainer_core.plugins import Host
from trainer_core.progress import Display
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.training import Training, parameter_groups
from trainer_core.types import Batch, Expert, ModelInputs, ModelSpec, Moment, Placement

LATENTS = (1, 16, 1, 8, 8)
WARM_UP = 50
CASES = {
    "one micro-batch, read every 10": (1, 10),
    "one micro-batch, read every step": (1, 1),
    "four micro-batches, read every 10": (4, 10),
}
BARE = "the same work without core"
SPEC = ModelSpec(
    name="nothing", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),),
)  # fmt: skip


class Nothing(nn.Module):
    """One parameter; the forward returns a constant times it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("constant", torch.ones(LATENTS))

    def forward(self, inputs: ModelInputs, plan: Any) -> tuple[Tensor, Mapping[int, Any]]:
        return self.constant * self.weight, {}


class Model:
    """What core asks of a model, with a token grid."""

    def __init__(self) -> None:
        network = Nothing()
        self.spec, self.modules = SPEC, {"transformer": network}
        self.networks = self.modules

    def predict(self, inputs: ModelInputs, plan: Any) -> tuple[Tensor, Mapping[int, Any]]:
        return self.networks[inputs.role](inputs, plan)

    def token_grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        return shape[-3], shape[-2] // 2, shape[-1] // 2


class Loss:
    info = PluginInfo(summary="a second loss term")

    @hookimpl
    def compute_loss(self, output: Any) -> LossTerm:
        return LossTerm("loss", output.prediction.flatten(1).mean(1))


class Prepare:
    info = PluginInfo(summary="hands inputs on as they are")

    @hookimpl
    def prepare_inputs(self, inputs: ModelInputs) -> ModelInputs:
        return inputs


class Offload:
    info = PluginInfo(summary="an empty context in every phase")

    @hookimpl
    def offload(self, phase: str | None) -> Any:
        return self.layer() if phase else None

    @contextmanager
    def layer(self) -> Iterator[None]:
        yield


class Tracker:
    info = PluginInfo(summary="takes records and drops them")

    @hookimpl
    def track(self, record: Any) -> None:
        pass


class Memory:
    """A loader over one prepared micro-batch.

    wall, cpu: what each step took, seconds of the clock and of the processor in all threads.
    """

    def __init__(self, steps: int, parts: int) -> None:
        self.steps, self.parts = steps, parts
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __iter__(self) -> Iterator[list[Batch]]:
        latents = torch.zeros(LATENTS)
        for step in range(1, self.steps + 1):
            group = [
                Batch(latents, {}, ("clip",), ("",), "memory", Moment(step, micro))
                for micro in range(self.parts)
            ]
            start, used = time.perf_counter(), time.process_time()
            yield group
            self.wall.append(time.perf_counter() - start)
            self.cpu.append(time.process_time() - used)


def made(folder: Path, *, steps: int, parts: int, interval: int) -> Training:
    """Return a training that is set up as ``loop.setup`` does, without data on a disk."""
    settings = CoreSettings(
        model_type="full", device="cpu", mixed_precision="no", max_train_steps=steps,
        gradient_accumulation_steps=parts, log_step_interval=interval, output_dir=str(folder),
        checkpoint_step_interval=0, optimizer="adamw", seed=7,
    )  # fmt: skip
    place = Placement(torch.device("cpu"), torch.float32, torch.float32)
    run = Run(settings, placement=place, output_dir=folder, notify=lambda _: None)
    plugins = {"loss": Loss(), "prepare": Prepare(), "offload": Offload(), "tracker": Tracker()}
    host = Host(plugins, builtins=(Flow(), Optimizers()), check_answers=True)
    run.spec, run.model = SPEC, Model()
    groups = parameter_groups(run, host)
    optimizer = host.hooks.build_optimizer(run=run, groups=groups)
    assert optimizer is not None
    trackers = [(name, functools.partial(_put, call, run)) for name, call in host.calls("track")]
    return Training(
        run=run, host=host, display=Display(Console(file=io.StringIO())),
        events=EventLog(folder / "events.jsonl"), trackers=Trackers(trackers, say=print),
        meter=Meter(), groups=groups, routes=loop.inside_the_forward(run, host),
        optimizer=optimizer, ema=None, sampler=SigmaSampler(settings, SPEC.experts),
        loader=Memory(steps, parts), eval_batches={}, total_steps=steps, run_id="bench",
        data_digest="", identity=Identity({}, {}, {}, lambda _: None),
    )  # fmt: skip


def _put(track: Callable[..., None], run: Run, record: Any) -> None:
    track(run=run, record=record)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another value under a name, and the old one back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Clocks:
    """Processor seconds of this thread by part of a step; an inner part does not count for the outer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it."""

        def timed(*words: Any, **names: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*words, **names)
            finally:
                whole = time.thread_time() - start
                self.seconds[part] += whole - self._inner.pop()
                self.calls[part] += 1
                self._inner[-1] += whole

        return timed


def instrumented(state: Training, clocks: Clocks, stack: ExitStack) -> None:
    """Wrap the parts of a step in clocks."""

    def put(owner: Any, name: str, part: str) -> None:
        timed = clocks.around(part, getattr(owner, name))
        stack.enter_context(replaced(owner, name, timed))

    host = state.host
    for hook in ("compute_loss", "prepare_inputs"):
        host._called[hook] = tuple(
            (plugin, clocks.around(f"hook {hook}", call)) for plugin, call in host.calls(hook)
        )
    for caller in host._manager.get_hookcallers(host.plugins["offload"]) or ():
        for found in caller.get_hookimpls():
            found.function = clocks.around("hook offload", found.function)
    put(loop.rng, "seed_global", "seed of the global generators")
    put(loop, "draw_inputs", "noise and sigma")
    put(loop, "prepared", "calling prepare_inputs, checks")
    put(loop, "loss_terms", "calling compute_loss, checks")
    put(Tensor, "backward", "backward")
    put(state.run.model, "predict", "forward")
    put(loop, "clip_gradients", "gradient norm and clipping")
    put(loop, "learning_rate", "learning rate")
    put(state.optimizer, "step", "optimiser")
    put(state.optimizer, "zero_grad", "optimiser")
    put(reporting.Reporter, "end_step", "reporting: meter, event log, queue")
    put(Display, "say", "a line for the user")
    put(loop, "train_step", "the rest of train_step (phases, sums, scalars)")


def measured(folder: Path, *, steps: int, parts: int, interval: int, split: bool) -> Any:
    """Return (the loader with the time of each step, seconds and calls by part) of one run."""
    state = made(folder, steps=steps, parts=parts, interval=interval)
    clocks = Clocks()
    with ExitStack() as stack:
        stack.enter_context(replaced(persistence, "save", lambda _: None))
        stack.enter_context(replaced(persistence, "finish", lambda _: None))
        if split:
            instrumented(state, clocks, stack)
        loop.train(state)
    state.trackers.end(state.step)
    state.events.close()
    assert state.step == steps
    return state.loader, clocks


def bare_torch(steps: int) -> Memory:
    """Return the time of the same work written down without core: torch's own share."""
    network, latents, loader = Nothing(), torch.zeros(LATENTS), Memory(steps, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for _ in loader:
        eps, sigma = torch.randn(LATENTS), torch.rand(1)
        s = sigma.view(-1, 1, 1, 1, 1)
        x_t, target = (1 - s) * latents + s * eps, eps - latents
        prediction, _ = network(x_t, None)
        loss = (prediction - target).square().mean() + prediction.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return loader


def figures(rounds: Sequence[Memory]) -> dict[str, float | list[float]]:
    """Return the median of the steps in milliseconds: that of the quietest round, then of each."""
    found: dict[str, float | list[float]] = {}
    for name in ("wall", "cpu"):
        medians = [statistics.median(getattr(r, name)[WARM_UP:]) for r in rounds]
        found[name] = round(1e3 * min(medians), 4)
        found[f"{name}_by_round"] = [round(1e3 * value, 4) for value in medians]
    return found


def shares(clocks: Clocks, steps: int) -> dict[str, dict[str, float]]:
    """Return milliseconds and calls a step by part, the largest first."""
    ordered = sorted(clocks.seconds.items(), key=lambda item: -item[1])
    return {
        part: {"ms": round(1e3 * value / steps, 4), "calls": round(clocks.calls[part] / steps, 3)}
        for part, value in ordered
    }


def main() -> None:
    """Measure, print and write core.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="a round; above 50, which warm up")
    parser.add_argument("--rounds", type=int, default=5, help="of all cases in turn")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rounds: dict[str, list[Memory]] = defaultdict(list)
    parts: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(words.rounds):
            for name, (micro, interval) in CASES.items():
                folder = Path(scratch) / f"{number}-{name}"
                keys = {"steps": words.steps, "parts": micro, "interval": interval}
                rounds[name].append(measured(folder, **keys, split=False)[0])
            rounds[BARE].append(bare_torch(words.steps))
            folder = Path(scratch) / f"{number}-parts"
            _, clocks = measured(folder, steps=words.steps, parts=1, interval=10, split=True)
            parts.append(shares(clocks, words.steps))
    quietest = min(parts, key=lambda found: sum(row["ms"] for row in found.values()))
    result = {
        "steps": words.steps - WARM_UP, "rounds": words.rounds, "plugins": 4, "latents": LATENTS,
        "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "cores": os.cpu_count(), "threads": 1,
        "ms_per_step": {name: figures(loaders) for name, loaders in rounds.items()},
        "parts_cpu": quietest,
        "hooks_ms": round(sum(v["ms"] for k, v in quietest.items() if k.startswith("hook ")), 4),
    }  # fmt: skip
    (words.folder / "core.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["ms_per_step"].items():
        print(f"{name:40s} {row['wall']:.3f} ms, processor {row['cpu']:.3f} ms")
    for name, row in quietest.items():
        print(f"  {name:50s} {row['ms']:.4f} ms, {row['calls']:g} calls")


if __name__ == "__main__":
    main()
