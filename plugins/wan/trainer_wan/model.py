"""The model that a run trains: diffusers' transformer, loaded, behind core's protocols."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer_core.blocks import BlockStack
from trainer_core.errors import ModelError
from trainer_core.types import BlockFlops, ForwardPlan, ModelInputs, ModelSpec, Placement, TapResult
from trainer_wan.network import WanNetwork

if TYPE_CHECKING:
    from trainer_core.run import Run

TEXT_TOKENS = 512
"""Length that captions are padded to, as the model was trained."""


class WanModel:
    """What ``load_model`` returns; satisfies Model, Blocks, TokenGrid, CountedBlocks and SamplingGrid.

    modules: role → ``WanTransformer3DModel``. networks: role → :class:`WanNetwork` over it; core
    may replace an entry by its wrapper. scheduler: the config of the scheduler that samples are drawn
    with.
    """

    def __init__(
        self,
        spec: ModelSpec,
        networks: Mapping[str, WanNetwork],
        *,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = spec
        self._scheduler = scheduler or {}
        self.networks: dict[str, nn.Module] = dict(networks)
        self.modules = {role: network.transformer for role, network in networks.items()}
        self._bare = dict(networks)
        config = next(iter(self.modules.values())).config
        self.hidden_size: int = config.num_attention_heads * config.attention_head_dim
        self._ffn_size: int = config.ffn_dim
        self._patch: tuple[int, int, int] = tuple(config.patch_size)

    def predict(
        self, inputs: ModelInputs, plan: ForwardPlan
    ) -> tuple[Tensor, Mapping[int, TapResult]]:
        """Return the prediction (B, C, F, H, W) float32 of ``inputs.role`` and the taps."""
        prediction, taps = self.networks[inputs.role](inputs, plan)
        return prediction, taps

    def stacks(self) -> dict[str, BlockStack]:
        """Return role → its stack of blocks."""
        return {role: network.stack for role, network in self._bare.items()}

    def bare(self, role: str) -> WanNetwork:
        """Return the network itself, without what core wrapped around it."""
        return self._bare[role]

    def block_flops(self, num_tokens: int) -> BlockFlops:
        """Return the operations of one block's forward; the text is padded to 512 tokens."""
        width, ffn, text = self.hidden_size, self._ffn_size, TEXT_TOKENS
        return BlockFlops(
            weights=(12 * width**2 + 4 * width * ffn) * num_tokens,
            attention=4 * width * num_tokens * (num_tokens + text),
            text=4 * text * width**2,
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
    folder: Path,
    *,
    spec: ModelSpec,
    placement: Placement,
    train_all: bool,
    checkpointing: bool,
    scheduler: Mapping[str, Any] | None = None,
) -> WanModel:
    """Return the model of a transformer's folder, on ``placement.device``.

    train_all: every weight is trained, in ``placement.trained_dtype``, mode train. Otherwise all
    are frozen, in ``placement.frozen_dtype`` (what diffusers keeps in float32 stays so), mode eval.
    Raises ModelError where the file's tensors are not exactly the model's.
    """
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):  # building layers draws, loading then overwrites
        transformer, report = WanTransformer3DModel.from_pretrained(
            folder,
            dtype=placement.trained_dtype if train_all else placement.frozen_dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(kind) or ()):
            raise ModelError(
                f"the weights in {folder} do not fit their config.json: {kind.replace('_', ' ')} "
                f"{names[0]} and {len(names) - 1} more. Fetch the model again."
            )
    _place(transformer, placement.device, blocks=placement.blocks_device)
    transformer.requires_grad_(train_all)
    transformer.train(train_all)
    network = WanNetwork(transformer, dtype=placement.dtype)
    network.train(train_all)
    network.stack.policy = "full" if checkpointing else "none"
    return WanModel(spec, {spec.experts[0].role: network}, scheduler=scheduler)


def _place(transformer: nn.Module, device: torch.device, *, blocks: torch.device) -> None:
    """Move a transformer to its device, and its blocks to theirs."""
    if blocks == device:
        transformer.to(device)
        return
    for name, child in transformer.named_children():
        child.to(blocks if name == "blocks" else device)
    for name, parameter in list(transformer.named_parameters(recurse=False)):
        setattr(transformer, name, nn.Parameter(parameter.detach().to(device)))
