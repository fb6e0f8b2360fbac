"""What travels between core and plugins. No torch import at run time: listing plugins is instant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from pydantic import BaseModel
    from torch import Tensor, nn

    from trainer_core.planner.sketch import Sketch

API_VERSION = 1
"""Number of the plugin interface. It changes only when a hook or a type changes incompatibly."""

Phase = Literal["cache", "encode", "forward", "backward", "update", "validate", "save"]


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin declares; all of it is checked before anything heavy is loaded.

    api: number of the plugin interface it was written for, :data:`API_VERSION`.
    summary: one line for ``trainer plugins list``.
    settings: pydantic model of the keys it owns (frozen, ``extra="forbid"``), or None.
    provides: exclusive roles such as ``"model"``, ``"adapter"``, ``"umt5"``; of two plugins in a run
        with one role, the run is refused naming both.
    values: ``"key=value"`` settings that select it, such as ``"lora_type=standard"``.
    switch: the key whose presence (and, for a bool, truth) infers it when no plugin list is given.
    requires: names or roles of other plugins (strings), and capabilities that the model must have
        (protocols of :mod:`trainer_core.capabilities`).
    conflicts: names or roles it cannot share a run with.
    after: names or roles whose wrappers and chained results it comes after (it lies outside them).
    exposes: for a model plugin, the capabilities its model will have, so that ``trainer check`` can
        answer without weights.
    serves: ``"key=value"`` settings of others that need it too, such as
        ``"model_flavour=i2v-14b-2.1"``: it joins every run that has one of them.
    """

    api: int = API_VERSION
    summary: str = ""
    settings: type[BaseModel] | None = None
    provides: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    switch: str | None = None
    requires: tuple[str | type, ...] = ()
    conflicts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    exposes: tuple[type, ...] = ()
    serves: tuple[str, ...] = ()


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """One set of trained weights and the share of the noise range it is trained on.

    role: name in ``Model.modules``. sigma_min, sigma_max: its range in [0, 1].
    """

    role: str
    sigma_min: float = 0.0
    sigma_max: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """What core must know about a model before its weights are loaded.

    fps: frame rate it was trained at, frames per second.
    frame_stride: a clip has ``frame_stride * n + 1`` frames (4 for Wan: 1, 5, 9, ... 81).
    alignment: height and width of a clip are multiples of it, in pixels.
    patch: (frames, height, width) pixels of one token on average: the VAE's factor times the patch.
    sizes: (width, height) pairs it was trained at; other buckets are warned about. May be empty.
    experts: trained roles with their noise ranges, at least one.
    sentence: what is trained, in one sentence for the user.
    num_blocks: blocks of the smallest expert, None where that is not known without the weights.
    needs: names of tensors that encoders must write beside ``latents``, with who has such an encoder.
    """

    name: str
    fps: float
    frame_stride: int
    alignment: int
    patch: tuple[int, int, int]
    experts: tuple[Expert, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    sentence: str = ""
    num_blocks: int | None = None
    needs: Mapping[str, str] = field(default_factory=dict)

    def snap_frames(self, frames: int) -> int:
        """Return the largest legal clip length that is not above ``frames`` (0 if there is none)."""
        return 0 if frames < 1 else (frames - 1) // self.frame_stride * self.frame_stride + 1

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the number of video tokens of a clip of that many frames and pixels."""
        in_time = (frames - 1) // self.patch[0] + 1
        return in_time * (height // self.patch[1]) * (width // self.patch[2])


@dataclass(frozen=True)
class BlockFlops:
    """Operations of one block's forward, 2 for each multiply and add.

    weights: products of video tokens with weights. attention: products of tokens with tokens, self-
    and cross-attention. text: products of text tokens with weights, the same for any video. spared: of
    ``weights``, what a recompute of the block leaves out while they are frozen.
    """

    weights: float
    attention: float
    text: float
    spared: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Where and in which dtype ``load_model`` puts frozen weights and trained ones.

    dtype: of frozen weights and of products. trained_dtype: of trained weights. blocks: where the
    frozen weights of the blocks are left, for who moves them to the device; None: on the device.
    stored_dtype: of frozen weights, where it is not that of products.
    """

    device: torch.device
    dtype: torch.dtype
    trained_dtype: torch.dtype
    blocks: torch.device | None = None
    stored_dtype: torch.dtype | None = None

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Dtype in which frozen weights are loaded."""
        return self.stored_dtype or self.dtype

    @property
    def blocks_device(self) -> torch.device:
        """Where the frozen weights of the blocks are loaded to."""
        return self.blocks or self.device


# --- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor that an encoder writes. ``pad_to``: zero-pad dim 0 to that length when batching."""

    name: str
    pad_to: int | None = None


@dataclass(frozen=True)
class Encoder:
    """A frozen network whose outputs are cached.

    name: unique, begins with the plugin's name. reads: "pixels" (a clip) or "caption" (a text).
    writes: the tensors of one sample. identity: JSON-able facts that decide the output bit by bit:
    weights digest, settings, dtype; called once before loading; it becomes part of the cache key.
    load: puts the network on ``run.device`` and returns it; core drops it after the last sample.
    batch_size: samples per ``encode_batch`` call; groups are fixed by the plan. keep: where outputs of
    pixels are kept: "clips", a dataset's ``cache_dir_vae``, or "image_embeds", the place that its
    ``conditioning_image_embeds`` names.
    quantised: its weights are stored as ``text_encoder_1_precision`` says (see
    ``trainer_core.QUANTISE_ENCODER``).
    sketch: for ``trainer plan``: returns the network without contents, of its full size, without reading
        weights; ``encode_batch`` gets it with samples without contents. None: nothing is told.
    """

    name: str
    reads: Literal["pixels", "caption"]
    writes: tuple[EncodedTensor, ...]
    identity: Callable[[], Mapping[str, Any]]
    load: Callable[[], Any]
    batch_size: int = 1
    keep: Literal["clips", "image_embeds"] = "clips"
    quantised: bool = False
    sketch: Callable[[Sketch], Any] | None = None


@dataclass(frozen=True)
class EncoderQuantiser:
    """How a text encoder's weights are stored. identity: JSON-able facts for the encoder's identity.

    apply: takes the network on the CPU and returns it on ``run.device``, its linear layers stored so.
    """

    identity: Mapping[str, Any]
    apply: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder together with what its ``load`` returned."""

    encoder: Encoder
    network: Any

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return self.encoder.name


@dataclass(frozen=True)
class EncoderSample:
    """One input of an encoder: ``pixels`` (F, 3, H, W) uint8 on the CPU, or ``caption``."""

    pixels: Tensor | None = None
    caption: str | None = None


# --- one micro-batch ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Where in a run a draw happens: optimiser step (from 1), micro step (from 0), process rank."""

    step: int
    micro: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Batch:
    """Encoded samples of one bucket, on ``run.device``.

    latents: (B, C, F, H, W) float32, normalised. conditioning: other encoder outputs by name, (B, ...).
    sample_ids: names for error messages, one per sample. captions: after dropout.
    """

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    sample_ids: tuple[str, ...]
    captions: tuple[str, ...]
    dataset: str
    moment: Moment


@dataclass(frozen=True)
class ModelInputs:
    """A noised micro-batch (flow matching).

    x0, eps, x_t, target: (B, C, F, H, W) float32. sigma: (B,) float32 in [0, 1]; t = 1000 sigma.
    loss_weight: (B,) float32. role: which expert of the model is trained here.
    training: False in evaluation and in ``run.predict``: no routes, no taps.
    """

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    t: Tensor
    x_t: Tensor
    target: Tensor
    loss_weight: Tensor
    conditioning: Mapping[str, Tensor]
    role: str
    moment: Moment
    training: bool = True


@dataclass(frozen=True)
class Route:
    """Tokens that skip blocks ``start`` to ``end``, both inclusive, resolved to 0-based indices.

    keep: called once per micro-step, outside the forward, with (num_samples, num_tokens, moment);
    returns the kept token ids (B, K) int64, ascending, on ``run.device``.
    """

    plugin: str
    start: int
    end: int
    keep: Callable[[int, int, Moment], Tensor]


@dataclass(frozen=True)
class Residency:
    """Who moves the weights of which modules between memories.

    modules: qualified names below the model's roles; one owner per module. before(index, phase) and
    after(index, phase) surround block ``index`` in phase "forward" and "backward". role: whose blocks
    they are, None for those of every role. saving(index): surrounds the forward of a block with
    gradients, outside of any checkpoint, such as hooks on what autograd saves.
    """

    plugin: str
    modules: tuple[str, ...]
    before: Callable[[int, str], None]
    after: Callable[[int, str], None]
    role: str | None = None
    saving: Callable[[int], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class TapResult:
    """Hidden states behind a block: tokens (B, K, D); ids (B, K) of the tokens, None if all are there."""

    tokens: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class ForwardPlan:
    """What acts inside one forward: routes with their drawn ids, and tapped block indices."""

    routes: tuple[tuple[Route, Tensor], ...] = ()
    taps: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """Result of the forward: prediction (B, C, F, H, W) float32, its inputs, taps by block index."""

    prediction: Tensor
    inputs: ModelInputs
    taps: Mapping[int, TapResult] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerm:
    """One summand of the loss: value (B,) float32 with gradient, named after its plugin.

    metrics: 0-d tensors to log, left on the device.
    """

    name: str
    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """Trained parameters with a learning rate; None takes the run's."""

    name: str
    parameters: Sequence[tuple[str, nn.Parameter]]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Exported:
    """A file for another program that was written, read back and compared.

    error: largest difference of a layer's weight change, relative to that change. reader: what read it.
    """

    path: Path
    num_layers: int
    error: float
    reader: str


# --- what a run shows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A validation prompt. ``name`` is safe as a file name."""

    name: str
    text: str


@dataclass(frozen=True)
class Artifact:
    """A validation result: frames (F, H, W, 3) uint8 RGB; ``name`` is safe as a file name."""

    name: str
    frames: np.ndarray[Any, Any]
    fps: float
    caption: str = ""


@dataclass(frozen=True)
class Record:
    """What a tracker gets. kind: "start", "scalars", "media", "end".

    scalars: name → value for "scalars". files: name → path for "media". settings: for "start".
    """

    kind: Literal["start", "scalars", "media", "end"]
    step: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
