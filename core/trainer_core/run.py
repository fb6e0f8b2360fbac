"""What a plugin may see of a run, and typed state that plugins share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trainer_core import rng
from trainer_core.errors import PluginError
from trainer_core.files import RememberedDigests
from trainer_core.types import (
    EncoderQuantiser,
    ForwardPlan,
    ModelInputs,
    ModelSpec,
    Moment,
    Placement,
    Prompt,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer_core.capabilities import Model
    from trainer_core.planner.sketch import Sketch
    from trainer_core.settings.core import CoreSettings

T = TypeVar("T")


class Key(Generic[T]):
    """A typed name for shared state. Identity is the key, so two plugins cannot collide by spelling."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


FORCE_KEEP = Key["Tensor | None"]("force_keep")
"""Tokens that no route may drop: (B, N) bool, in the order of the token grid, or None for nothing.

A plugin that knows them sets it in ``prepare_inputs``, anew for every micro-batch. A mask on the CPU
costs no wait; for one on an accelerator the host waits once a micro-batch, to count.
"""

DROP_VAE_ENCODER = Key["bool"]("drop_vae_encoder")
"""True: nobody encodes with the VAE any more, so that a model loads it for decoding alone.

A plugin sets it in ``attach``, when everything is cached; the model's plugin reads it before it renders.
"""

IMAGE_EMBEDS_OF = Key["tuple[str, ...]"]("image_embeds_of")
"""Frames of a clip whose image embeddings the model takes: ("first",) or ("first", "last").

A model's plugin sets it in ``describe_model``; the plugin of an image encoder reads it in ``encoders``.
"""

MODEL_ASIDE = Key[Callable[[], AbstractContextManager[Any]]]("model_aside")
"""Makes room for another component: within the context the model's weights are off the accelerator.

A plugin sets it in ``attach``; the model's plugin enters it while it decodes samples.
"""

QUANTISE_ENCODER = Key[EncoderQuantiser | None]("quantise_encoder")
"""How ``text_encoder_1_precision`` stores the weights of a text encoder; nobody sets it for no_change.

The quantiser's plugin sets it in ``check``; the encoder's plugin declares ``Encoder.quantised``, loads
its network on the CPU where it is set, and lets it be applied.
"""


class State:
    """Values under typed keys. Reading one that nobody has set is an error that names the key."""

    def __init__(self) -> None:
        self._values: dict[Key[Any], Any] = {}

    def __setitem__(self, key: Key[T], value: T) -> None:
        self._values[key] = value

    def get(self, key: Key[T], default: T) -> T:
        """Return the value of a key, ``default`` where nobody has set it."""
        value: T = self._values.get(key, default)
        return value

    def __getitem__(self, key: Key[T]) -> T:
        if key not in self._values:
            raise PluginError(f"nothing has set the shared state {key!r} yet")
        value: T = self._values[key]
        return value

    def __contains__(self, key: Key[Any]) -> bool:
        return key in self._values


class Run:
    """One run, as plugins see it.

    settings: the core keys. output_dir: where everything that the run writes lies. device, placement:
    where weights go. spec: known after ``describe_model``; model: after ``load_model``; reading them
    too early is an error that says so. moment: the current optimiser step, micro step and rank.
    state: values shared under a Key. prompts: what ``validate`` renders. taps: blocks whose outputs
    are captured. most_tokens: video tokens of the largest clip to train on, 0 until the data is
    planned. clip_shapes: (frames, height, width) in pixels → number of clips in the plan, held-out ones
    included. idle_encoders: names of encoders whose outputs are not read any more; a plugin that is done
    with its own adds it, and batches read from then on come without. trained_steps: optimiser steps that
    weights about to be written have seen. settings_digest: of the keys that a resume may not change.
    sketch: while ``trainer plan`` rehearses the run, what networks without contents are built with; None
    in a real run.
    """

    def __init__(
        self,
        settings: CoreSettings,
        *,
        placement: Placement,
        output_dir: Path,
        rank: int = 0,
        world_size: int = 1,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.settings = settings
        self.placement = placement
        self.output_dir = output_dir
        self.rank = rank
        self.world_size = world_size
        self.state = State()
        self.moment = Moment(step=0, rank=rank)
        self.prompts: tuple[Prompt, ...] = ()
        self.taps: set[int] = set()
        self.most_tokens = 0
        self.clip_shapes: Mapping[tuple[int, int, int], int] = {}
        self.trained_steps = 0
        self.settings_digest = ""
        self.idle_encoders: set[str] = set()
        self.sketch: Sketch | None = None
        self._notify = notify
        self._said: set[str] = set()
        self._spec: ModelSpec | None = None
        self._model: Model | None = None
        self._captions: Callable[[str], Mapping[str, Tensor]] | None = None
        self._pixels: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]] | None = None
        self._example: Callable[[], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the accelerator, or the CPU."""
        return self.placement.device

    @property
    def seed(self) -> int:
        """Seed that every draw derives from."""
        return self.settings.seed

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model that are known without its weights."""
        if self._spec is None:
            raise PluginError("run.spec is known only after describe_model")
        return self._spec

    @spec.setter
    def spec(self, spec: ModelSpec) -> None:
        self._spec = spec

    @property
    def model(self) -> Model:
        """The loaded model."""
        if self._model is None:
            raise PluginError("run.model is known only after load_model")
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self._model = model

    def file_digest(self, path: Path) -> str:
        """Return the digest of a file's bytes, remembered in the cache folder by path, size and time.

        For the identity of an encoder: weights of many gigabytes are read once, not at every start.
        """
        return RememberedDigests(Path(self.settings.cache_dir) / "weights.json").of(path)

    def generator(
        self,
        purpose: str,
        *parts: int | str,
        moment: Moment | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Generator:
        """Return a generator for (seed, purpose, step, micro step, rank, parts).

        ``purpose`` begins with the plugin's name. ``moment`` defaults to the current one.
        """
        at = moment or self.moment
        return rng.generator(self.seed, purpose, at.step, at.micro, at.rank, *parts, device=device)

    def request_tap(self, block: int) -> int:
        """Ask for the hidden states behind a block in every training forward, from ``attach`` on.

        block: index, negative from the end. Returns the index under which ``StepOutput.taps`` holds
        them. ``run.taps.discard(index)`` ends it.
        """
        from trainer_core.capabilities import Blocks

        if not isinstance(self.model, Blocks):
            raise PluginError(
                "a tap was requested, but the model is not a stack of blocks (Blocks)"
            )
        num_blocks = min(len(stack.blocks) for stack in self.model.stacks().values())
        index = block + num_blocks if block < 0 else block
        if not 0 <= index < num_blocks:
            raise PluginError(
                f"a tap was requested behind block {block}; it has {num_blocks} blocks"
            )
        self.taps.add(index)
        return index

    def predict(self, inputs: ModelInputs) -> Tensor:
        """Return the model's prediction (B, C, F, H, W): no gradient, eval mode, no routes, no taps."""
        import torch

        network = self.model.networks[inputs.role]
        was_training = network.training
        network.eval()
        try:
            with torch.no_grad():
                return self.model.predict(inputs, ForwardPlan())[0]
        finally:
            network.train(was_training)

    def encoded_caption(self, caption: str) -> Mapping[str, Tensor]:
        """Return the cached encoder outputs of a validation prompt or the empty caption, unbatched."""
        if self._captions is None:
            raise PluginError("captions are encoded only after the caching stage")
        return self._captions(caption)

    def encoded_pixels(self, clip: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return what the run's encoders write under ``names`` for a clip (F, 3, H, W) uint8, unbatched.

        Nothing is cached: each encoder is loaded, asked once, and dropped.
        """
        if self._pixels is None:
            raise PluginError("pixels are encoded only after the caching stage")
        return self._pixels(clip, names)

    def example_clip(self) -> Tensor:
        """Return a clip (F, 3, H, W) uint8: the first that is held out, else the first of all."""
        if self._example is None:
            raise PluginError("clips are read only after the caching stage")
        return self._example()

    def set_clips(
        self,
        encode: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]],
        example: Callable[[], Tensor],
    ) -> None:
        """Core's own: tell how pixels are encoded and where an example is read."""
        self._pixels, self._example = encode, example

    def set_captions(self, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Core's own: tell where encoded captions are read."""
        self._captions = read

    def say(self, message: str) -> None:
        """Show a line to the user."""
        self._notify(message)

    def say_once(self, message: str) -> None:
        """Show a line to the user the first time it comes."""
        if message not in self._said:
            self._said.add(message)
            self._notify(message)
