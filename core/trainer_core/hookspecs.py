"""The hooks, in the order in which a run calls them. Read this file first.

A plugin is a class with methods of these names, each marked with ``@hookimpl``; it leaves out the
arguments that it does not need. *First result*: the first answer that is not None counts.
*Collected*: every plugin's answer counts and the order never matters. *Chain*: each plugin gets the
result of the one before it. *Wrappers allowed*: a plugin may surround the others
(``@hookimpl(wrapper=True)``); ``PluginInfo.after`` decides who lies outside whom.

No hook is ever called inside a model's forward: what has to act there is returned at set-up as a
plain object (Route, Residency) or requested from the model (a tap), and core composes it.

A plugin may also have plain methods: ``check(run)``, called once ``run.spec`` is known and before the
data is planned, to refuse what cannot work; ``encoders(run)``; ``attach(run)``, called after the model
is loaded; ``parameters()``, ``state_dict()`` and ``load_state_dict(state)``. Three more tell ``trainer
plan`` what it cannot see: ``resident_bytes(blocks)``, how many bytes of frozen blocks of those sizes are
on the device at once; ``resting_bytes(run)``, how many of other frozen weights are in host memory
instead; ``occasions(run)``, each :class:`Occasion` beside training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from trainer_core.types import (
    Artifact,
    Batch,
    EncoderSample,
    Exported,
    LoadedEncoder,
    LossTerm,
    ModelInputs,
    ModelSpec,
    ParameterGroup,
    Phase,
    Record,
    Residency,
    Route,
    StepOutput,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trainer_core.capabilities import Model
    from trainer_core.run import Run

PROJECT = "trainer"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def describe_model(run: Run) -> ModelSpec | None:
    """Say what the data must look like for the model, before any weight is loaded.

    Called once, before the data is planned. First result; the role ``model`` is exclusive.
    Returns: frame rate, clip lengths, alignment, experts.
    Must not: load weights or reach for the network beyond a model's config file.
    """


@hookspec(firstresult=True)
def encode_batch(
    run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
) -> Sequence[Mapping[str, Tensor]] | None:
    """Encode samples of one shape; only the owner of ``encoder`` answers, others return None.

    Called on cache misses, one encoder after another; in groups fixed by the plan. First result.
    Arguments: what the plugin's ``encoders()`` declared, loaded; samples with pixels (F, 3, H, W)
    uint8 or captions.
    Returns: one mapping of CPU tensors for each sample, with exactly the names that the encoder
    writes, without padding.
    Must not: depend on anything but samples, weights and settings; draw random numbers.
    """


@hookspec(firstresult=True)
def load_model(run: Run) -> Model | None:
    """Load the model where ``run.placement`` says.

    Called once. First result; role ``model``. Wrappers allowed, ordered: quantise, then adapter, then
    freeze. A wrapper changes the model it gets from ``yield`` and returns it. Parameters to be trained
    have ``requires_grad``.
    """


@hookspec
def route_tokens(run: Run) -> Route | Sequence[Route] | None:
    """Say which tokens skip which blocks.

    Called once, after the model is loaded. Collected; overlapping routes are an error naming both.
    Never in effect in evaluation, validation or ``run.predict``.
    """


@hookspec
def offload(
    run: Run, phase: Phase | None
) -> Residency | Sequence[Residency] | AbstractContextManager[None] | None:
    """Move weights and states between memories.

    Called at set-up with ``phase=None`` (returns a Residency, or one for each role, composed into the
    block runner), then at every phase (returns a context manager; all are entered as an onion). One
    owner per module.
    """


@hookspec(firstresult=True)
def build_optimizer(run: Run, groups: Sequence[ParameterGroup]) -> Optimizer | None:
    """Build the optimiser that ``run.settings.optimizer`` names.

    Called once. First result; core's own optimisers answer last.
    Returns: an optimiser with one param group per entry of ``groups``, in that order.
    """


@hookspec
def prepare_inputs(run: Run, inputs: ModelInputs) -> ModelInputs:
    """Change the noised micro-batch.

    Called each micro-batch after noising, never in evaluation. A chain: in declared order each plugin
    gets the result of the one before it and returns a new value (``dataclasses.replace``).
    Must not: draw from a global generator; use ``run.generator``.
    """


@hookspec
def compute_loss(run: Run, batch: Batch, output: StepOutput) -> LossTerm | None:
    """Add one term to the loss.

    Called each micro-batch after the forward, gradients on. Collected; sorted by name, then summed.
    Returns: a term of shape (B,) float32. Must not: synchronise the host (``.item()``), keep ``output``.
    """


@hookspec(firstresult=True)
def save_weights(run: Run, folder: Path, final: bool) -> Sequence[str] | None:
    """Write what is trained in the form in which people use it.

    Called for every checkpoint and, with ``final``, at the end (live and averaged weights): then a full
    fine-tune writes all that is needed to use it. First result: the adapter's plugin answers with an
    adapter, the model's plugin without one.
    Returns: the names of the files written below ``folder``; ``load_weights`` restores from them the
    same bits. Must not count a file as written before it was read back and compared.
    """


@hookspec(firstresult=True)
def load_weights(run: Run, folder: Path) -> bool | None:
    """Restore what ``save_weights`` wrote, bit for bit, into ``run.model``.

    Called when a run resumes. First result: True from the plugin that did it.
    """


@hookspec(firstresult=True)
def export_weights(run: Run, path: Path, format: str, role: str) -> Exported | None:
    """Write what is trained of one role as another program reads it.

    Called by ``trainer export``, once for each role, with the weights restored into ``run.model``. First
    result: the adapter's plugin answers with an adapter.
    Arguments: format names the program ("diffusers", "comfyui"); one that cannot hold the adapter is
    refused with the way out.
    Must not: count the file as written before it was read back another way than it was written, and
    every layer's weight change was compared.
    """


@hookspec
def validate(run: Run) -> Sequence[Artifact]:
    """Render what the model can do now.

    Called before step 1 and every ``validation_step_interval`` steps, once for each set of weights
    (live, averaged). Collected. Core restores random state, modes, gradients and residency, writes the
    files and hands them to the trackers. Wrappers allowed.
    """


@hookspec
def track(run: Run, record: Record) -> None:
    """Report to a tracker. Called from a worker thread. Collected; an error is reported once and never
    stops training.
    """


WRAPPABLE = frozenset({"load_model", "validate"})
"""Hooks that a plugin may surround; a wrapper of any other hook is refused."""
