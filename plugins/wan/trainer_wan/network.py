"""The training forward of Wan: diffusers' own layers, driven block by block.

The arithmetic is that of ``WanTransformer3DModel.forward``, the result the same to rounding; what is
added are routes, taps, checkpointing and residency of core's block runner, and blocks with less memory
traffic (:mod:`trainer_wan.block`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.blocks import BlockStack, TokenContext
from trainer_core.recompute import FFN
from trainer_core.types import ForwardPlan, ModelInputs, TapResult
from trainer_wan.block import PARTS, Part, take_over

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class BlockCaller:
    """Calls one block for core's runner: ``caller(block, tokens, per_token, shared)``.

    per_token: rope_cos, rope_sin (1 or B, N, 1, head_dim); with token-wise timesteps also time
    (B, N, 6, D). shared: text (B, L, D); with one timestep for each sample also time (B, 6, D). part: see
    :mod:`trainer_wan.block`; only a block that was taken over knows it. chunk: tokens that the
    feed-forward takes at once, 0 for all.
    """

    chunk: int = 0

    def __call__(
        self,
        block: nn.Module,
        tokens: Tensor,
        per_token: Mapping[str, Tensor],
        shared: Mapping[str, Any],
        *,
        part: Part | None = None,
    ) -> Tensor:
        """Return the tokens behind the block."""
        time = per_token["time"] if "time" in per_token else shared["time"]
        rope = (per_token["rope_cos"], per_token["rope_sin"])
        options: dict[str, Any] = {"chunk": self.chunk} if self.chunk else {}
        if part is not None:
            options["part"] = part
        out: Tensor = block(tokens, shared["text"], time, rope, **options)
        return out


call_block = BlockCaller()


class WanNetwork(nn.Module):
    """One expert. Its forward is the training forward, which DDP, FSDP and compile wrap whole.

    transformer: the weights as diffusers knows them, adapters and quantised layers included.
    dtype: of the products; bfloat16 runs under autocast, so that float32 adapters and norms may
    stand beside bfloat16 weights; float32 runs without.
    """

    def __init__(self, transformer: WanTransformer3DModel, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.stack = BlockStack(transformer.blocks, parts=PARTS)
        self.call = call_block
        take_over(transformer.blocks)

    def chunk_feed_forward(self, tokens: int) -> None:
        """Compute feed-forwards over so many tokens at once, each again in the backward; 0: over all."""
        self.call = BlockCaller(chunk=tokens)
        self.stack.recomputed = frozenset({FFN} if tokens else ())

    def forward(
        self, inputs: ModelInputs, plan: ForwardPlan
    ) -> tuple[Tensor, dict[int, TapResult]]:
        """Return the predicted velocity (B, C, F, H, W) float32 and the taps of ``plan``."""
        text = inputs.conditioning["text_embeds"]
        return self.velocity(inputs.x_t, inputs.t, text, plan)

    def velocity(
        self, x_t: Tensor, t: Tensor, text: Tensor, plan: ForwardPlan | None = None
    ) -> tuple[Tensor, dict[int, TapResult]]:
        """Return the predicted velocity (B, C, F, H, W) float32 and the taps.

        x_t: (B, C, F, H, W). t: (B,) or, for each token, (B, N); in [0, 1000]. text: (B, L,
        text_dim), zero-padded to the 512 tokens that the model was trained with.
        """
        plan = plan or ForwardPlan()
        with self._autocast(x_t.device):
            model = self.transformer
            rope_cos, rope_sin = model.rope(x_t)  # (1, N, 1, head_dim), float32
            tokens = model.patch_embedding(x_t.to(self.dtype))  # (B, D, F', H', W')
            tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
            embedding, modulation = self._time(t)
            embedded_text = model.condition_embedder.text_embedder(text.to(self.dtype))
            per_token = {"rope_cos": rope_cos, "rope_sin": rope_sin}
            shared = {"text": embedded_text}
            (per_token if t.ndim == 2 else shared)["time"] = modulation
            tokens, taps = self.stack.run(
                tokens,
                call=self.call,
                context=TokenContext(per_token=per_token, shared=shared),
                plan=plan,
            )
            prediction = self._unpatchify(self._head(tokens, embedding), x_t.shape)
        return prediction.float(), taps

    def _time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time embedding (B, D) and the blocks' modulation (B, 6, D), each (B, N, ...)
        with token-wise timesteps.
        """
        embedder = self.transformer.condition_embedder
        wave = embedder.timesteps_proj(t.flatten())
        wave = wave.unflatten(0, t.shape)  # (B, freq_dim) or (B, N, freq_dim)
        weight_dtype = next(embedder.time_embedder.parameters()).dtype
        with torch.autocast(t.device.type, enabled=False):
            # In float32 as in inference: bfloat16 would round neighbouring timesteps together.
            if weight_dtype.is_floating_point:
                wave = wave.to(weight_dtype)
            embedding = embedder.time_embedder(wave).to(self.dtype)
        modulation = embedder.time_proj(embedder.act_fn(embedding))
        return embedding, modulation.unflatten(-1, (6, -1))

    def _head(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Return the output rows (B, N, patch * C) of the last layer."""
        model = self.transformer
        if embedding.ndim == 2:
            embedding = embedding.unsqueeze(1)
        table = model.scale_shift_table.to(embedding.device)  # (1, 2, D)
        shift, scale = (table.unsqueeze(0) + embedding.unsqueeze(2)).unbind(2)
        tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        out: Tensor = model.proj_out(tokens)
        return out

    def _unpatchify(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return latents (B, C, F, H, W) from rows (B, N, p_t * p_h * p_w * C)."""
        p_t, p_h, p_w = self.transformer.config.patch_size
        frames, height, width = shape[2] // p_t, shape[3] // p_h, shape[4] // p_w
        grid = rows.reshape(shape[0], frames, height, width, p_t, p_h, p_w, -1)
        grid = grid.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return grid.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)
