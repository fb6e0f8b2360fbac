"""The training forward of Wan: diffusers' own layers, driven block by block.

The arithmetic is that of ``WanTransformer3DModel.forward``, the result the same to rounding; what is
added are routes, taps, checkpointing and residency of core's block runner, and blocks with less memory
traffic (:mod:`trainer_wan.block`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.blocks import BlockStack, TokenContext
from trainer_core.recompute import FFN
from trainer_core.types import ForwardPlan, ModelInputs, TapResult
from trainer_wan.block import PARTS, Part, take_over
from trainer_wan.condition import noise_mask, token_timesteps

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
    stand beside bfloat16 weights; float32 runs without. token_wise: a timestep for each token, as the
    model was trained; without it only where the tokens of a clip differ. before_forward: called first.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, *, dtype: torch.dtype, token_wise: bool = False
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.token_wise = token_wise
        self.before_forward: Callable[[], None] | None = None
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
        """Return the predicted velocity (B, C, F, H, W) float32 and the taps of ``plan``.

        The conditioning may hold ``condition`` (B, 20, F, H, W), which is joined to x_t; ``image_embeds``
        (B, L, 1280) of CLIP; ``first_frame`` (B, C, 1, H, W), which takes the place of x_t's own where
        ``first_frame_given`` (B,) says so. There the velocity is known, and it is the target.
        """
        known = inputs.conditioning
        first, given = known.get("first_frame"), known.get("first_frame_given")
        if first is None:
            given = None
        elif given is None:
            given = torch.ones(first.shape[0], dtype=torch.bool, device=first.device)
        prediction, taps = self.velocity(
            inputs.x_t,
            inputs.t,
            known["text_embeds"],
            plan,
            condition=known.get("condition"),
            image=known.get("image_embeds"),
            first_frame=first,
            given=given,
        )
        if given is not None:
            noisy = noise_mask(prediction, given)
            prediction = torch.where(noisy > 0, prediction, inputs.target)
        return prediction, taps

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
        plan: ForwardPlan | None = None,
        *,
        condition: Tensor | None = None,
        image: Tensor | None = None,
        first_frame: Tensor | None = None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, TapResult]]:
        """Return the predicted velocity (B, C, F, H, W) float32 and the taps.

        x_t: (B, C, F, H, W). t: (B,) or, for each token, (B, N); in [0, 1000]. text: (B, L,
        text_dim), zero-padded to the 512 tokens that the model was trained with. condition, image,
        first_frame: see :meth:`forward`. given: (B,) bool, the samples that have ``first_frame``.
        """
        plan = plan or ForwardPlan()
        if self.before_forward is not None:
            self.before_forward()
        if t.ndim == 1 and (self.token_wise or given is not None):
            noisy = noise_mask(x_t, given)
            if first_frame is not None:
                x_t = (1 - noisy) * first_frame + noisy * x_t
            t = token_timesteps(t, noisy, self.transformer.config.patch_size)
        with self._autocast(x_t.device):
            model = self.transformer
            rope_cos, rope_sin = model.rope(x_t)  # (1, N, 1, head_dim), float32
            joined = x_t if condition is None else torch.cat([x_t, condition], 1)
            tokens = model.patch_embedding(joined.to(self.dtype))  # (B, D, F', H', W')
            tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
            embedding, modulation = self._time(t)
            context = self._context(text, image)
            per_token = {"rope_cos": rope_cos, "rope_sin": rope_sin}
            shared = {"text": context}
            (per_token if t.ndim == 2 else shared)["time"] = modulation
            tokens, taps = self.stack.run(
                tokens,
                call=self.call,
                context=TokenContext(per_token=per_token, shared=shared),
                plan=plan,
            )
            prediction = self._unpatchify(self._head(tokens, embedding), x_t.shape)
        return prediction.float(), taps

    def _context(self, text: Tensor, image: Tensor | None) -> Tensor:
        """Return what cross-attention looks at, (B, L, D): the image's tokens, then the text's."""
        embedder = self.transformer.condition_embedder
        embedded: Tensor = embedder.text_embedder(text.to(self.dtype))
        if image is None:
            return embedded
        if (
            embedder.image_embedder.pos_embed is not None
        ):  # it takes two images a sample, one by one
            image = image.unflatten(1, (2, -1)).flatten(0, 1)  # (2 B, L / 2, 1280)
        return torch.cat([embedder.image_embedder(image.to(self.dtype)), embedded], 1)

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
