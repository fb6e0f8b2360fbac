"""The commands ``run``, ``check`` and ``data``: what happens around the loop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from trainer_core import loop, persistence
from trainer_core.answers import encoders_of
from trainer_core.blame import blame
from trainer_core.data import (
    CachedData,
    DataPlan,
    fill_cache,
    load_backends,
    plan_data,
    render_report,
)
from trainer_core.data.sampler import Sampler
from trainer_core.data.single import encode_clip, example
from trainer_core.distributed import placement, world
from trainer_core.errors import ConfigError, PluginError, Problem, TrainerError
from trainer_core.faults import told
from trainer_core.files import blocked, digest_json
from trainer_core.flow import shares_sentence
from trainer_core.optim import check_arguments, schedule_sentence
from trainer_core.persistence import Identity
from trainer_core.phases import phase
from trainer_core.progress import Display
from trainer_core.run import Run
from trainer_core.settings.explain import plugin_versions, write_settings
from trainer_core.settings.idle import idle_keys
from trainer_core.settings.load import located
from trainer_core.types import Encoder, EncoderSample, LoadedEncoder, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.plugins import Host
    from trainer_core.settings.core import CoreSettings
    from trainer_core.settings.load import Resolved
    from trainer_core.training import Training


STDERR = 2
MOST_FILES = 40
"""Clips that ``run`` and ``check`` list one by one; of larger datasets they list what is not used."""


@dataclass(frozen=True)
class Session:
    """What every command sets up first: the run context and the plan of the data."""

    run: Run
    host: Host
    display: Display
    plan: DataPlan
    identity: Identity


def run(resolved: Resolved, host: Host) -> int:
    """Train. Returns the exit code: 0, or 128 + the signal that ended the run early."""
    with told(), blame(host), located(resolved):
        session = prepare(resolved, host)
        with only_one(session.run.output_dir):
            return _run(session)


def check(resolved: Resolved, host: Host) -> int:
    """Do everything up to the first step that needs no accelerator, and say what would happen."""
    with told(), blame(host), located(resolved):
        session = prepare(resolved, host)
        render_report(session.plan, session.display.console, most_files=MOST_FILES)
        encoders = collect_encoders(session.run, host)
        say_embeds(session, encoders)
        for encoder in encoders:
            encoder.identity()
        start = persistence.find_start(session.run, session.identity)
        say_schedule(session)
        where = f"from {start.folder}" if start else "from step 0"
        session.display.say(f"All settings are valid; the run would start {where}.")
    return 0


def data(resolved: Resolved, host: Host) -> int:
    """Print what becomes of every file."""
    with told(), blame(host), located(resolved):
        session = prepare(resolved, host)
        render_report(session.plan, session.display.console)
    return 0


def prepare(resolved: Resolved, host: Host, *, display: Display | None = None) -> Session:
    """Describe the model and plan the data, before anything heavy is loaded."""
    display = display or Display()
    current = describe(resolved, host, display)
    settings = resolved.core
    backends = load_backends(Path(settings.data_backend_config), settings)
    plan = plan_data(backends, settings, current.spec, say=display.say, progress=display.task)
    current.most_tokens, current.clip_shapes = plan.most_tokens, plan.clip_shapes
    identity = Identity(
        fixed=resolved.fixed(),
        versions=plugin_versions(resolved),
        resolved=resolved.resolved(),
        write=lambda folder: write_settings(resolved, folder),
    )
    current.settings_digest = digest_json(identity.fixed)
    return Session(current, host, display, plan, identity)


def describe(resolved: Resolved, host: Host, display: Display) -> Run:
    """Check the settings and describe the model; no data is looked at."""
    for choice in resolved.choices:
        display.say(f"plugin {choice.name}: {choice.why}")
    for notice in (*resolved.unused, *idle_keys(resolved.core, resolved.origins)):
        display.say(notice)
    settings = resolved.core
    _check_folders(settings)
    check_arguments(settings)
    rank, world_size = world()
    current = Run(
        settings,
        placement=placement(settings),
        output_dir=Path(settings.output_dir),
        rank=rank,
        world_size=world_size,
        notify=display.say,
    )
    spec = host.hooks.describe_model(run=current)  # HOOK first result
    if spec is None:
        raise PluginError(
            "no plugin in this run provides a model; name one with --plugins or set model_family"
        )
    current.spec = spec
    display.say(f"model {spec.name}: {spec.sentence}")
    if shares := shares_sentence(settings, spec.experts):
        display.say(shares)
    for plugin in host.plugins.values():
        if (look := getattr(plugin, "check", None)) is not None:
            look(current)
    if settings.validation_prompt:
        current.prompts = (Prompt("validation", settings.validation_prompt),)
    return current


def _check_folders(settings: CoreSettings) -> None:
    """Refuse folders that cannot be made or written to, while nothing is lost by it."""
    given = {"output_dir": settings.output_dir, "cache_dir": settings.cache_dir}
    found = {key: (path, reason) for key, path in given.items() if (reason := blocked(Path(path)))}
    way_out = "Name another folder."
    problems = [Problem(k, text, path, "", way_out) for k, (path, text) in found.items()]
    if problems:
        raise ConfigError(problems)


def collect_encoders(current: Run, host: Host) -> list[Encoder]:
    """Return the encoders that the run's plugins declare; two of one name or output are refused."""
    encoders: list[Encoder] = []
    writers: dict[str, str] = {}
    for name, plugin in host.plugins.items():
        if (declare := getattr(plugin, "encoders", None)) is None:
            continue
        for encoder in encoders_of(name, declare(current)):
            for output in (encoder.name, *(tensor.name for tensor in encoder.writes)):
                if output in writers:
                    raise PluginError(
                        f"plugins {writers[output]!r} and {name!r} both declare the encoder or output "
                        f"{output!r}; leave one of them out"
                    )
                writers[output] = name
            encoders.append(encoder)
    precision = current.settings.text_encoder_1_precision
    if precision != "no_change" and not any(encoder.quantised for encoder in encoders):
        text = "no text encoder of this run can be stored so."
        problem = Problem("text_encoder_1_precision", text, precision, way_out="Write no_change.")
        raise ConfigError([problem])
    if "latents" not in writers:
        raise PluginError(
            'no encoder of this run writes "latents"; the model\'s plugin must have one'
        )
    for tensor, owner in current.spec.needs.items():
        if tensor not in writers:
            raise PluginError(
                f"{current.spec.name} needs {tensor!r}, which no encoder of this run writes; install "
                f"{owner}, or name it in --plugins"
            )
    return encoders


def _run(session: Session) -> int:
    current, host, display = session.run, session.host, session.display
    render_report(session.plan, display.console, most_files=MOST_FILES)
    say_schedule(session)
    checkpoint = persistence.find_start(current, session.identity)
    cached = cache(session)
    if checkpoint is not None:
        persistence.check_same(checkpoint, session.identity, data=cached.plan.digest)
    start = persistence.begin(current, host, session.identity, checkpoint)
    training = None
    try:
        training = loop.setup(current, host, cached, display=display, start=start)
        with ending_on_signals(training):
            loop.train(training)
        return ended(training)
    finally:
        if training is not None:
            training.loader.close()
        start.events.close()
        start.trackers.end(training.step if training else start.step)


def cache(session: Session) -> CachedData:
    """Encode what no cache holds yet: one encoder after another over all of its misses."""
    current, settings = session.run, session.run.settings
    texts = ["", *(prompt.text for prompt in current.prompts)]
    if current.prompts:
        texts.append(settings.validation_negative_prompt)
    with phase(session.host, current, "cache"):
        encoders = collect_encoders(current, session.host)
        say_embeds(session, encoders)
        cached = fill_cache(
            session.plan,
            current,
            encoders,
            Encoding(session.host, current),
            captions=list(dict.fromkeys(texts)),
            progress=session.display.task,
        )
    current.set_captions(cached.read_caption)
    current.set_clips(partial(encode_clip, cached), partial(example, cached))
    for encoder in cached.encoders:
        made, reused = cached.encoded[encoder.name], cached.reused[encoder.name]
        current.say(f"cache of {encoder.name}: {reused} reused, {made} encoded")
    return cached


def say_embeds(session: Session, encoders: Sequence[Encoder]) -> None:
    """Say that image embeddings are asked for where the model takes none."""
    takes = any(encoder.keep == "image_embeds" for encoder in encoders)
    if session.plan.backends.names_embeds and not takes:
        session.display.say(
            f"conditioning_image_embeds has no effect: {session.run.spec.name} takes no image embeddings"
        )


@dataclass(frozen=True)
class Encoding:
    """Calls the encoders' plugins, each group of samples in the phase "encode"."""

    host: Host
    current: Run

    def encode_batch(
        self, *, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return what the owner of ``encoder`` makes of the samples."""
        with phase(self.host, self.current, "encode"):
            hooks = self.host.hooks
            return hooks.encode_batch(run=run, encoder=encoder, samples=samples)  # HOOK first


def say_schedule(session: Session) -> None:
    """Say what an odd warm-up does, while there is time to change it."""
    settings = session.run.settings
    total = persistence.total_steps(settings, Sampler(session.plan).groups_per_epoch)
    sentence = schedule_sentence(settings, total)
    if sentence:
        session.display.say(sentence)


def ended(training: Training) -> int:
    """Say where everything is; return the exit code."""
    current, say = training.run, training.run.say
    if training.stop is not None and not training.finished:
        what = "a checkpoint was written" if training.step else "there was nothing to save"
        say(
            f"Stopped by {training.stop.name} after step {training.step}; {what}. "
            "The same command goes on from there."
        )
        return 128 + int(training.stop)
    say(f"Done: {training.step} steps.")
    training.events.flush()  # the last loss is still in its buffer
    for name, (first, last) in held_out(current.output_dir / persistence.EVENTS).items():
        say(f"  held-out loss {first:.4f} before, {last:.4f} after ({name})")
    for line in training.costs.table():
        say(line)
    say(f"In {current.output_dir}:")
    for line in contents(current.output_dir):
        say(f"  {line}")
    return 0


def held_out(events: Path) -> dict[str, tuple[float, float]]:
    """Return the first and last held-out loss by dataset, from the event log."""
    found: dict[str, tuple[float, float]] = {}
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "eval":
            values = {k: v for k, v in event.items() if k.startswith("eval/")}
            found |= {name: (found.get(name, (v, v))[0], v) for name, v in values.items()}
    return found


def contents(folder: Path) -> Iterator[str]:
    """Yield a line for each thing that a run leaves in its output folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            num_files = sum(1 for item in path.rglob("*") if item.is_file())
            yield f"{path.name}/  {num_files} files"
        else:
            yield f"{path.name}  {path.stat().st_size} bytes"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse a second run in the same output folder while one is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+") as file:
        if not _lock(file.fileno()):
            raise TrainerError(
                f"another run is writing to {folder}; wait for it, or give this one another "
                "--output_dir"
            )
        yield


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def ending_on_signals(training: Training) -> Iterator[None]:
    """Let SIGINT and SIGTERM finish the step and save; a second one exits at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if training.stop is not None:
            os._exit(128 + number)
        training.stop = signal.Signals(number)
        text = f"\n{training.stop.name}: finishing the step and saving; once more exits at once.\n"
        os.write(STDERR, text.encode())  # a lock of the display may be held right now

    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
