"""The model that a run trains: diffusers' transformer, loaded, behind core's protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.blocks import BlockStack
from trainer_core.transfer import pinned, sent
from trainer_core.types import (
    BlockFlops,
    ForwardPlan,
    ModelInputs,
    ModelSpec,
    Moment,
    Placement,
    TapResult,
)
from trainer_wan.loading import FLAG, load_transformer
from trainer_wan.names import AuthorsNames
from trainer_wan.network import WanNetwork
from trainer_wan.weights import TransformerFiles

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

    from trainer_core.run import Run

TI2V_CHANNELS = 48
IMAGE_TOKENS = 257
"""CLIP's tokens of one image: its class and 16 x 16 patches."""
TEXT_TOKENS = 512
"""Length that captions are padded to, as the model was trained."""


class WanModel(AuthorsNames):
    """What ``load_model`` returns; satisfies Model, Blocks, TokenGrid, CountedBlocks, SamplingGrid and
    NativeNames.

    modules: role → ``WanTransformer3DModel``. networks: role → :class:`WanNetwork` over it; core
    may replace an entry by its wrapper. scheduler: the config of the scheduler that samples are drawn
    with. draw_given: (moment, B) → (B,) bool on the CPU, the clips whose first frame TI2V is given.
    """

    def __init__(
        self,
        spec: ModelSpec,
        networks: Mapping[str, WanNetwork],
        *,
        scheduler: Mapping[str, Any] | None = None,
        draw_given: Callable[[Moment, int], Tensor] | None = None,
    ) -> None:
        self.spec = spec
        self._draw_given = draw_given
        self._scheduler = scheduler or {}
        self.networks: dict[str, nn.Module] = dict(networks)
        self.modules = {role: network.transformer for role, network in networks.items()}
        self._bare = dict(networks)
        config = next(iter(self.modules.values())).config
        self.hidden_size: int = config.num_attention_heads * config.attention_head_dim
        self._ffn_size: int = config.ffn_dim
        self._image_tokens = IMAGE_TOKENS if config.image_dim else 0
        if config.pos_embed_seq_len:
            self._image_tokens = config.pos_embed_seq_len
        self._patch: tuple[int, int, int] = tuple(config.patch_size)

    def predict(
        self, inputs: ModelInputs, plan: ForwardPlan
    ) -> tuple[Tensor, Mapping[int, TapResult]]:
        """Return the prediction (B, C, F, H, W) float32 of ``inputs.role`` and the taps."""
        prediction, taps = self.networks[inputs.role](self._with_given(inputs), plan)
        return prediction, taps

    def _with_given(self, inputs: ModelInputs) -> ModelInputs:
        """Return the inputs with the drawn choice of clips whose first frame is given.

        It depends on the moment alone, so that every forward of a micro-step has the same one. What is
        held out (step 0) has it always, a clip of one frame never.
        """
        known = dict(inputs.conditioning)
        if "first_frame" not in known or self._draw_given is None:
            return inputs
        num_samples, frames = inputs.x_t.shape[0], inputs.x_t.shape[2]
        given = torch.full((num_samples,), frames > 1)
        if inputs.moment.step:
            given &= self._draw_given(inputs.moment, num_samples)
        if given.any():  # on the CPU
            device = inputs.x_t.device
            known["first_frame_given"] = sent(pinned(given, device), device)
        else:
            del known["first_frame"]
        return replace(inputs, conditioning=known)

    def stacks(self) -> dict[str, BlockStack]:
        """Return role → its stack of blocks."""
        return {role: network.stack for role, network in self._bare.items()}

    def bare(self, role: str) -> WanNetwork:
        """Return the network itself, without what core wrapped around it."""
        return self._bare[role]

    def block_flops(self, num_tokens: int) -> BlockFlops:
        """Return the operations of one block's forward.

        The text is padded to 512 tokens; those of CLIP stand beside it.
        """
        width, ffn, text = self.hidden_size, self._ffn_size, TEXT_TOKENS + self._image_tokens
        return BlockFlops(
            weights=(12 * width**2 + 4 * width * ffn) * num_tokens,
            attention=4 * width * num_tokens * (num_tokens + text),
            text=4 * text * width**2,
            spared=2 * width * ffn * num_tokens,  # see trainer_wan.fused.gated_feed_forward
        )

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (frames, rows, columns) of tokens for latents (B, C, F, H, W)."""
        frames, height, width = latent_shape[-3:]
        return frames // self._patch[0], height // self._patch[1], width // self._patch[2]

    def sampling_sigmas(self, run: Run) -> Tensor:
        """Return the levels (n + 1,) of the scheduler that draws the run's samples, the last one 0."""
        from trainer_wan.sampling import scheduler_for, settle

        sampling = settle(run, self._scheduler)
        scheduler = scheduler_for(self._scheduler, sampling)
        scheduler.set_timesteps(sampling.steps)
        return scheduler.sigmas.float()


def load(
    files: Sequence[TransformerFiles],
    *,
    spec: ModelSpec,
    placement: Placement,
    train_all: bool = False,
    scheduler: Mapping[str, Any] | None = None,
    base: TransformerFiles | None = None,
    one_time: bool = False,
    draw_given: Callable[[Moment, int], Tensor] | None = None,
    say: Callable[[str], None] = print,
) -> WanModel:
    """Return the model of one or two experts, on ``placement.device``.

    train_all: every weight is trained, in ``placement.trained_dtype``, mode train. Otherwise all
    are frozen, in ``placement.frozen_dtype`` (what diffusers keeps in float32 stays so), mode eval.
    one_time: ``wan_force_2_1_time_embedding``; base: where a time embedding comes from that does not
    fit. Raises ModelError where the file's tensors are not exactly the model's.
    """
    networks = {}
    dtype = placement.trained_dtype if train_all else placement.frozen_dtype
    for each in files:
        transformer, cured = load_transformer(
            each, dtype=dtype, base=base, force_2_1_time_embedding=one_time
        )
        if cured:
            source = base.source if base else ""
            say(f"{FLAG}: the time embedding, {len(cured)} tensors, comes from {source}")
        elif one_time and not token_wise(transformer):
            say(f"{FLAG} changes nothing: the time embedding of {each.source} fits as it is")
        networks[each.role] = network_of(
            transformer,
            placement=placement,
            train_all=train_all,
            one_time=one_time,
        )
    return WanModel(spec, networks, scheduler=scheduler, draw_given=draw_given)


def token_wise(transformer: WanTransformer3DModel) -> bool:
    """Return whether a transformer was trained with a timestep for each token."""
    return bool(transformer.config.in_channels == TI2V_CHANNELS)


def network_of(
    transformer: WanTransformer3DModel,
    *,
    placement: Placement,
    train_all: bool = False,
    one_time: bool = False,
) -> WanNetwork:
    """Return the training forward over a transformer, which moves to where ``placement`` says."""
    _place(transformer, placement.device, blocks=placement.blocks_device)
    transformer.requires_grad_(train_all)
    transformer.train(train_all)
    network = WanNetwork(
        transformer, dtype=placement.dtype, token_wise=token_wise(transformer) and not one_time
    )
    network.train(train_all)
    return network


def _place(transformer: nn.Module, device: torch.device, *, blocks: torch.device) -> None:
    """Move a transformer to its device, and its blocks to theirs."""
    if blocks == device:
        transformer.to(device)
        return
    for name, child in transformer.named_children():
        child.to(blocks if name == "blocks" else device)
    for name, parameter in list(transformer.named_parameters(recurse=False)):
        setattr(transformer, name, nn.Parameter(parameter.detach().to(device)))
