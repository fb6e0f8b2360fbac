"""Runs every phase of a run once over tensors without contents, and weighs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.blocks import draw_plan
from trainer_core.capabilities import Blocks
from trainer_core.errors import PluginError
from trainer_core.flow import noised
from trainer_core.loop import inside_the_forward
from trainer_core.planner.live import LiveBytes, Operations, num_bytes, weights_of
from trainer_core.planner.sketch import Sketch, real
from trainer_core.session import collect_encoders
from trainer_core.training import averaged, checked_model, loss_terms, parameter_groups
from trainer_core.types import (
    Batch,
    Encoder,
    EncoderSample,
    ForwardPlan,
    LoadedEncoder,
    ModelInputs,
    Moment,
    StepOutput,
)

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.run import Run

Shape = tuple[int, int, int]
Encoded = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Phase:
    """What lives on the device at the worst moment of a phase: what → bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Forecast:
    """What a run needs. phases: in the order in which they come. clip: (frames, height, width) of the
    largest clip, in pixels, that was rehearsed; tokens: of a micro-batch of such clips. operations: of
    an optimiser step over such clips. cache: encoder → bytes on the disk, before compression. trained:
    number of trained parameters. host: bytes of weights that a plugin keeps in host memory. encoded: what
    the encoders write for that clip, name → (shape, dtype). unknown: what could not be told, in
    sentences.
    """

    phases: tuple[Phase, ...]
    clip: Shape
    tokens: int
    operations: int
    cache: Mapping[str, int]
    trained: int
    host: int
    encoded: Mapping[str, Encoded]
    unknown: tuple[str, ...] = ()

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.num_bytes)


def forecast(run: Run, host: Host, *, known: Forecast | None = None) -> Forecast:
    """Return what the run needs. ``run.spec`` and ``run.clip_shapes`` are known; nothing is loaded.

    known: of the same run with other settings of training; its encoders are not rehearsed again.
    """
    rehearsal = Rehearsal(run, host)
    encoders = collect_encoders(run, host)
    run.sketch = rehearsal.sketch
    try:
        if known is not None:
            rehearsal.take(known)
        else:
            for encoder in encoders:
                rehearsal.encode(encoder)
        rehearsal.train()
        rehearsal.others()
    finally:
        run.sketch = None
    return rehearsal.told()


def largest(shapes: Mapping[Shape, int], tokens: Callable[[int, int, int], int]) -> Shape:
    """Return the clip shape with most tokens."""
    return max(shapes, key=lambda shape: (tokens(*shape), shape))


def modules_in(network: Any) -> list[nn.Module]:
    """Return the networks that an encoder's ``sketch`` gave: itself, or what its attributes hold."""
    inside = [network] if isinstance(network, nn.Module) else list(vars(network).values())
    return [value for value in inside if isinstance(value, nn.Module)]


ENCODING, TRAINING, SAMPLES = "encoding", "training", "samples"
"""How the names of phases begin."""


class Rehearsal:
    """What is known so far, phase by phase."""

    def __init__(self, run: Run, host: Host) -> None:
        self.run, self.host, self.sketch = run, host, Sketch()
        self.clip = largest(run.clip_shapes, run.spec.tokens)
        self.phases: list[Phase] = []
        self.encoded: dict[str, Encoded] = {}
        self.cache: dict[str, int] = {}
        self.unknown: list[str] = []
        self.beside: list[Tensor] = []
        self.tokens = self.operations = self.trained = self.at_home = 0

    def told(self) -> Forecast:
        """Return the result."""
        return Forecast(
            tuple(self.phases), self.clip, self.tokens, self.operations, self.cache, self.trained,
            self.at_home, self.encoded, tuple(self.unknown),
        )  # fmt: skip

    def take(self, known: Forecast) -> None:
        """Take over what encoders need and write."""
        self.phases += [phase for phase in known.phases if phase.name.startswith(ENCODING)]
        self.encoded, self.cache = dict(known.encoded), dict(known.cache)

    def encode(self, encoder: Encoder) -> None:
        """Rehearse one encoder on the largest clip, or on the longest caption."""
        if encoder.sketch is None:
            self.unknown.append(f"what {encoder.name} needs: its plugin tells nothing about it")
            return
        network = encoder.sketch(self.sketch)
        modules = modules_in(network)
        frames, height, width = self.clip
        with self._weighing(modules) as live, torch.no_grad():
            pixels = None
            if encoder.reads == "pixels":
                pixels = torch.empty(frames, 3, height, width, dtype=torch.uint8)
            sample = EncoderSample(pixels, None if encoder.reads == "pixels" else "")
            samples = [sample] * (encoder.batch_size if pixels is not None else 1)
            loaded, hooks = LoadedEncoder(encoder, network), self.host.hooks
            made = hooks.encode_batch(run=self.run, encoder=loaded, samples=samples)  # HOOK first
            if not made:
                raise PluginError(f"no plugin encodes for {encoder.name!r}, which one declares")
            weights = num_bytes(weights_of(modules))
            self._add(f"{ENCODING} with {encoder.name}", live, {"weights": weights})
        self.encoded |= {name: (tuple(v.shape), v.dtype) for name, v in made[0].items()}
        self.cache[encoder.name] = self._on_disk(encoder, made[0])

    def _on_disk(self, encoder: Encoder, made: Mapping[str, Tensor]) -> int:
        one = num_bytes(made.values())
        shapes, spec = self.run.clip_shapes, self.run.spec
        if encoder.reads == "caption":
            return one * sum(shapes.values())
        most = spec.tokens(*self.clip)
        return sum(one * spec.tokens(*shape) * count // most for shape, count in shapes.items())

    def train(self) -> None:
        """Rehearse an optimiser step over the largest clip, with the optimiser's state there."""
        run, host = self.run, self.host
        with self.sketch.at_work():
            run.model = checked_model(host.hooks.load_model(run=run), host)  # HOOK first result
            for plugin in host.plugins.values():
                if (attach := getattr(plugin, "attach", None)) is not None:
                    attach(run)
            groups = parameter_groups(run, host)
            routes = inside_the_forward(run, host)
            ema = averaged(run)
            optimizer = host.hooks.build_optimizer(run=run, groups=groups)  # HOOK first result
            batch = self._batch()
        assert optimizer is not None  # core's own answer last, with an error
        for network in run.model.networks.values():
            network.train()
        parameters = [p for group in groups for _, p in group.parameters]
        self.trained = sum(p.numel() for p in parameters)
        frozen = self._frozen(parameters)
        self.tokens = batch.latents.shape[0] * run.spec.tokens(*self.clip)
        plan = self._plan(routes, batch)
        averages = [] if ema is None else list(ema.state_dict().values())
        given = [batch.latents, *batch.conditioning.values()]
        with self._weighing([], [*frozen, *parameters, *averages, *given]) as live:
            _step(optimizer, parameters)  # makes its state
            optimizer.zero_grad(set_to_none=True)
            micro, operations = run.settings.gradient_accumulation_steps, Operations()
            if micro > 1:  # gradients of earlier micro-batches lie there
                _give_gradients(parameters)
            live.restart()
            with operations:
                kept = self._micro_step(batch, plan, live)
            _step(optimizer, parameters)
            self.operations = operations.total * micro
            state = [v for s in optimizer.state.values() for v in s.values() if _is_tensor(v)]
            self.at_home = self._at_home(parameters)
            # while samples come from the averages, the trained weights wait beside them
            waits = ema is not None and run.settings.ema_validation != "none"
            self.beside = [*averages, *state, *(torch.empty_like(p) for p in parameters if waits)]
            live.peak -= self.at_home
            self._add(TRAINING, live, {
                "frozen weights": num_bytes(frozen) - self.at_home,
                "trained weights": num_bytes(parameters),
                "their averages": num_bytes(averages),
                "optimiser": num_bytes(state),
                "kept for the backward pass": kept,
            })  # fmt: skip

    def others(self) -> None:
        """Rehearse what plugins say they will do beside training, with what training keeps there."""
        for plugin in self.host.plugins.values():
            if (occasions := getattr(plugin, "occasions", None)) is None:
                continue
            with self.sketch.at_work():
                found = list(occasions(self.run))
            for occasion in found:
                model = [] if occasion.aside else weights_of(self.run.model.modules.values())
                away = 0 if occasion.aside else self.at_home
                weights = [*model, *weights_of(occasion.modules)]
                with self._weighing([], [*weights, *self.beside]) as live, torch.no_grad():
                    occasion.act()
                    live.peak -= away
                    self._add(occasion.name, live, {
                        "weights": num_bytes(weights) - away,
                        "averages and optimiser": num_bytes(self.beside),
                    })  # fmt: skip

    def _micro_step(self, batch: Batch, plan: ForwardPlan, live: LiveBytes) -> int:
        """Do forward and backward; return the bytes that wait for the backward."""
        inputs, before = self._inputs(batch), live.live
        prediction, taps = self.run.model.predict(inputs, plan)
        output = StepOutput(prediction, inputs, taps)
        terms = loss_terms(self.host, self.run, batch, output)
        loss = torch.stack([term.value for term in terms]).sum(0).mean()
        kept = live.live - before
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return kept

    def _inputs(self, batch: Batch) -> ModelInputs:
        run = self.run
        return noised(
            batch.latents, torch.empty_like(batch.latents),
            torch.empty(batch.latents.shape[0], device=run.device),
            conditioning=batch.conditioning, role=run.spec.experts[0].role, moment=batch.moment,
        )  # fmt: skip

    def _batch(self) -> Batch:
        """Return a micro-batch of the largest clip, padded as the loader pads."""
        run = self.run
        num = run.settings.train_batch_size
        pads = {
            tensor.name: tensor.pad_to
            for encoder in collect_encoders(run, self.host)
            for tensor in encoder.writes
        }
        stacked: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.encoded.items():
            rows = (pads.get(name) or shape[0],) if shape else ()
            stacked[name] = torch.empty((num, *rows, *shape[1:]), dtype=dtype, device=run.device)
        latents = stacked.pop("latents").float()
        names = tuple(f"clip {number}" for number in range(num))
        return Batch(latents, stacked, names, ("",) * num, "plan", Moment(step=1))

    def _plan(self, routes: Sequence[Any], batch: Batch) -> ForwardPlan:
        if not routes and not self.run.taps:
            return ForwardPlan()
        num = batch.latents.shape[0]
        with real():
            plan = draw_plan(
                routes, tuple(sorted(self.run.taps)), num, self.tokens // num, batch.moment
            )
        drawn = tuple((route, self.sketch.of(ids)) for route, ids in plan.routes)
        return ForwardPlan(routes=drawn, taps=plan.taps)

    def _at_home(self, trained: Sequence[Tensor]) -> int:
        """Return the bytes of frozen weights that plugins keep off the device at any moment."""
        plugins = self.host.plugins.values()
        tells = (getattr(plugin, "resting_bytes", None) for plugin in plugins)
        rest = sum(int(tell(self.run)) for tell in tells if tell is not None)
        if not isinstance(self.run.model, Blocks):
            return rest
        ours = {id(parameter) for parameter in trained}
        stacks = [
            [
                num_bytes(v for v in block.parameters() if id(v) not in ours)
                for block in stack.blocks
            ]
            for stack in self.run.model.stacks().values()
        ]
        for plugin in plugins:
            if (resident := getattr(plugin, "resident_bytes", None)) is not None:
                # blocks that come one by one: what rests are the same weights
                return sum(sum(blocks) - int(resident(blocks)) for blocks in stacks)
        return rest

    def _frozen(self, trained: Sequence[Tensor]) -> list[Tensor]:
        ours = {id(parameter) for parameter in trained}
        every = weights_of(self.run.model.modules.values())
        return [value for value in every if id(value) not in ours]

    def _weighing(
        self, modules: Sequence[nn.Module], values: Sequence[Tensor] = ()
    ) -> AbstractContextManager[LiveBytes]:
        return _Weighing(self.sketch, [*weights_of(modules), *values])

    def _add(self, name: str, live: LiveBytes, parts: Mapping[str, int]) -> None:
        known = {what: size for what, size in parts.items() if size}
        rest = max(live.peak - sum(known.values()), 0)
        self.phases.append(Phase(name, {**known, "at work": rest}))


class _Weighing(AbstractContextManager[LiveBytes]):
    """Inside a sketch, with a counter that knows some tensors already."""

    def __init__(self, sketch: Sketch, values: Sequence[Tensor]) -> None:
        self._sketch, self._values, self._stack = sketch, values, ExitStack()

    def __enter__(self) -> LiveBytes:
        live = LiveBytes()
        live.know(self._values)
        self._stack.enter_context(self._sketch.at_work())
        self._stack.enter_context(live)
        live.restart()
        return live

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _give_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    _give_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
