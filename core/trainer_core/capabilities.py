"""What a model offers. A plugin's ``requires`` names these; core checks them once, after loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer_core.blocks import BlockStack
    from trainer_core.run import Run
    from trainer_core.types import BlockFlops, ForwardPlan, ModelInputs, ModelSpec, TapResult


@runtime_checkable
class Model(Protocol):
    """What ``load_model`` returns.

    spec: the same facts that ``describe_model`` gave. modules: role → the weights as their library
    knows them; checkpoint, export and EMA walk the roles. networks: role → an ``nn.Module`` whose
    forward is the training forward, which DDP, FSDP and compile wrap whole:
    ``network(inputs, plan) -> (prediction, taps)``.
    """

    spec: ModelSpec
    modules: Mapping[str, nn.Module]
    networks: Mapping[str, nn.Module]

    def predict(
        self, inputs: ModelInputs, plan: ForwardPlan
    ) -> tuple[Tensor, Mapping[int, TapResult]]:
        """Return the prediction (B, C, F, H, W) float32 of ``inputs.role`` and the taps of ``plan``."""
        ...


@runtime_checkable
class Blocks(Protocol):
    """A model that is a stack of blocks over tokens (B, N, D), run by core's :class:`BlockStack`.

    With it come routes, taps, checkpoint policies and residency. hidden_size: D.
    """

    hidden_size: int

    def stacks(self) -> Mapping[str, BlockStack]:
        """Return role → its stack of blocks."""
        ...


@runtime_checkable
class TokenGrid(Protocol):
    """A model whose tokens lie on a grid of frames, rows and columns, in that order."""

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (frames, rows, columns) of tokens for latents (B, C, F, H, W)."""
        ...


@runtime_checkable
class CountedBlocks(Protocol):
    """A model that knows what one of its blocks costs."""

    def block_flops(self, num_tokens: int) -> BlockFlops:
        """Return the operations of one block's forward over ``num_tokens`` video tokens of a sample."""
        ...


@runtime_checkable
class SamplingGrid(Protocol):
    """A model that knows the noise levels that its samples are drawn on."""

    def sampling_sigmas(self, run: Run) -> Tensor:
        """Return the levels (n + 1,) float32 of the run's validation sampler, falling, the last one 0.

        n is ``validation_num_inference_steps``; the shift is that of the samples.
        """
        ...


@runtime_checkable
class NativeNames(Protocol):
    """A model that knows what its layers are called in its authors' files, which ComfyUI reads too."""

    def native_name(self, layer: str) -> str:
        """Return the authors' name of a layer of ``modules``; ModelError if they have none."""
        ...

    def layers_of(self, native: Sequence[str]) -> Mapping[str, str]:
        """Return authors' name → layer of ``modules``, found another way than :meth:`native_name` goes.

        For the proof of files: through the converter that the model's library has for such files.
        """
        ...

    def read_lora(self, path: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return layer → (A (r, in), B (out, r)) of a LoRA file, the change being B @ A.

        Read as the model's library reads it, whatever names that knows, with the scale in the matrices.
        CheckpointError where the library cannot read the file.
        """
        ...
