"""What a model offers. A plugin's ``requires`` names these; core checks them once, after loading."""

from __future__ import annotations

from collections.abc import Mapping
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
