"""A tiny video model as a plugin: a few thousand parameters, trained in milliseconds on a CPU.

It has what core and techniques need of a model (blocks, a token grid, taps, routes, encoders) and needs
no library beside torch, so that a plugin's tests run through the real loop in a second. Its
"encoders" are closed forms: latents are averages of pixels, a caption's embedding comes from its digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core import rng
from trainer_core.capabilities import Blocks, SamplingGrid, TokenGrid
from trainer_core.errors import CheckpointError
from trainer_core.files import read_tensors, write_tensors
from trainer_core.hookspecs import hookimpl
from trainer_core.settings.keys import PluginSettings, key
from trainer_core.types import (
    Artifact,
    EncodedTensor,
    Encoder,
    EncoderSample,
    Expert,
    ForwardPlan,
    LoadedEncoder,
    ModelInputs,
    ModelSpec,
    PluginInfo,
    TapResult,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer_core.blocks import BlockStack
    from trainer_core.run import Run

CHANNELS, WIDTH, TEXT_WIDTH, TEXT_LENGTH = 4, 32, 8, 16
FACTOR = 8  # pixels of a latent pixel, per axis


class TinySettings(PluginSettings):
    """Keys of the tiny model."""

    tiny_layers: int = key(4, "Blocks of the tiny model.", ge=1)
    tiny_text_width: int = key(
        0, "Width of text_embeds that another plugin writes; 0: it encodes captions itself.", ge=0
    )


class TinyModel:
    """Satisfies Model, Blocks, TokenGrid and SamplingGrid."""

    def __init__(self, spec: ModelSpec, network: nn.Module, stack: BlockStack) -> None:
        self.spec = spec
        self.modules: Mapping[str, nn.Module] = {"transformer": network}
        self.networks: Mapping[str, nn.Module] = {"transformer": network}
        self.hidden_size = WIDTH
        self._stack = stack

    def predict(
        self, inputs: ModelInputs, plan: ForwardPlan
    ) -> tuple[Tensor, Mapping[int, TapResult]]:
        """Return the prediction and the taps."""
        prediction, taps = self.networks[inputs.role](inputs, plan)
        return prediction, taps

    def stacks(self) -> Mapping[str, BlockStack]:
        """Return role → its stack of blocks."""
        return {"transformer": self._stack}

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (frames, rows, columns) of tokens."""
        return latent_shape[-3], latent_shape[-2] // 2, latent_shape[-1] // 2

    def sampling_sigmas(self, run: Run) -> Tensor:
        """Return evenly spaced levels from 1 to 0, shifted as the settings say."""
        import torch

        from trainer_core.flow import shifted

        settings = run.settings
        even = torch.linspace(1, 0, settings.validation_num_inference_steps + 1)
        return shifted(even, settings.flow_schedule_shift or 1.0)


class Tiny:
    """Plugin ``tiny``: role model; ``model_family: tiny`` selects it."""

    info = PluginInfo(
        summary="A tiny video model for tests",
        settings=TinySettings,
        provides=("model",),
        values=("model_family=tiny",),
        exposes=(Blocks, TokenGrid, SamplingGrid),
    )

    def __init__(self, settings: TinySettings) -> None:
        self.settings = settings

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """Return facts like Wan's: 16 fps, 4n+1 frames, alignment 16."""
        return ModelSpec(
            name="tiny",
            fps=16.0,
            frame_stride=4,
            alignment=2 * FACTOR,
            patch=(4, 2 * FACTOR, 2 * FACTOR),
            experts=(Expert("transformer"),),
            sentence=f"a tiny model of {self.settings.tiny_layers} blocks, {run.settings.model_type}",
            num_blocks=self.settings.tiny_layers,
        )

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the two encoders; that of captions only where no other plugin has one."""
        version = {"version": 1}
        latents = Encoder(
            name="tiny.latents",
            reads="pixels",
            writes=(EncodedTensor("latents"),),
            identity=lambda: version,
            load=lambda: None,
            batch_size=run.settings.vae_batch_size,
        )
        caption = Encoder(
            name="tiny.caption",
            reads="caption",
            writes=(EncodedTensor("text_embeds", pad_to=TEXT_LENGTH),),
            identity=lambda: version,
            load=lambda: None,
        )
        return [latents] if self.settings.tiny_text_width else [latents, caption]

    @hookimpl
    def encode_batch(
        self, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> list[dict[str, Tensor]] | None:
        """Average pixels to latents; turn a caption's digest into an embedding."""
        if encoder.name == "tiny.latents":
            return [{"latents": latents_of(s.pixels)} for s in samples if s.pixels is not None]
        if encoder.name == "tiny.caption":
            return [{"text_embeds": embedding_of(s.caption or "")} for s in samples]
        return None

    @hookimpl
    def load_model(self, run: Run) -> TinyModel:
        """Build the network from the run's seed."""
        width = self.settings.tiny_text_width or TEXT_WIDTH
        network, stack = build_network(self.settings.tiny_layers, seed=run.seed, text_width=width)
        network.to(run.device)
        stack.blocks.to(run.placement.blocks_device)
        network.requires_grad_(run.settings.model_type == "full")
        return TinyModel(run.spec, network, stack)

    @hookimpl
    def save_weights(self, run: Run, folder: Path) -> list[str] | None:
        """Write all weights of a full fine-tune."""
        if run.settings.model_type != "full":
            return None
        write_tensors(folder / "tiny.safetensors", run.model.modules["transformer"].state_dict())
        return ["tiny.safetensors"]

    @hookimpl
    def load_weights(self, run: Run, folder: Path) -> bool | None:
        """Restore them."""
        if run.settings.model_type != "full":
            return None
        path = folder / "tiny.safetensors"
        if not path.exists():
            raise CheckpointError(f"{folder} has no tiny.safetensors")
        run.model.modules["transformer"].load_state_dict(read_tensors(path))
        return True

    @hookimpl
    def validate(self, run: Run) -> list[Artifact]:
        """Return one clip per prompt: a grey level that depends on the weights."""
        import numpy as np

        total = sum(
            float(p.detach().double().sum()) for p in run.model.modules["transformer"].parameters()
        )
        level = int(abs(total) * 1000) % 256
        frames = np.full((5, 32, 32, 3), level, dtype=np.uint8)
        return [Artifact(prompt.name, frames, 16.0, prompt.text) for prompt in run.prompts]


class BareModel:
    """Satisfies Model and nothing else: no blocks, no token grid."""

    def __init__(self, model: TinyModel) -> None:
        self.spec, self.modules, self.networks = model.spec, model.modules, model.networks
        self.predict = model.predict


class Bare(Tiny):
    """Plugin ``bare``: the tiny model without any capability, which techniques must refuse."""

    info = replace(Tiny.info, summary="A tiny video model without capabilities", exposes=())

    @hookimpl
    def load_model(self, run: Run) -> BareModel:  # type: ignore[override]  # it offers less
        """Hide what the tiny model offers."""
        return BareModel(super().load_model(run))


def latents_of(pixels: Tensor) -> Tensor:
    """Return latents (4, 1 + (F-1)/4, H/8, W/8) of pixels (F, 3, H, W) uint8: averages in [-1, 1]."""
    import torch

    x = pixels.float() / 127.5 - 1
    x = torch.nn.functional.avg_pool2d(torch.cat([x, x.mean(1, keepdim=True)], 1), FACTOR)
    first, rest = x[:1], x[1:]
    groups = rest.reshape(-1, 4, *rest.shape[1:]).mean(1)
    return torch.cat([first, groups]).transpose(0, 1).contiguous()


def embedding_of(caption: str) -> Tensor:
    """Return (number of words, at most 16; 8) float32: one row a word, from its digest."""
    import torch

    words = caption.split()[:TEXT_LENGTH] or [""]
    rows = [torch.randn(TEXT_WIDTH, generator=rng.generator(0, "tiny/word", w)) for w in words]
    return torch.stack(rows)


def build_network(
    layers: int, *, seed: int, text_width: int = TEXT_WIDTH
) -> tuple[nn.Module, BlockStack]:
    """Return the network and its stack; weights from a private generator."""
    import torch
    from torch import nn

    from trainer_core.blocks import BlockStack, TokenContext

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.mlp = nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
            )

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            h = self.norm(x) + extra
            attention = nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
            x = x + self.out(attention)
            out: Tensor = x + self.mlp(self.norm(x) + extra)
            return out

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Linear(4 * CHANNELS, WIDTH)
            self.text = nn.Linear(text_width, WIDTH)
            self.time = nn.Linear(1, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.head = nn.Linear(WIDTH, 4 * CHANNELS)

        def forward(self, inputs: ModelInputs, plan: ForwardPlan) -> Any:
            x = inputs.x_t
            b, c, f, h, w = x.shape
            grid = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
            tokens = self.patch(grid.reshape(b, f * (h // 2) * (w // 2), 4 * c))
            text = self.text(inputs.conditioning["text_embeds"]).mean(1, keepdim=True)
            extra = text + self.time(inputs.t.view(-1, 1, 1) / 1000)
            tokens, taps = stack.run(
                tokens, call=call, context=TokenContext(shared={"extra": extra}), plan=plan
            )
            rows = self.head(tokens).reshape(b, f, h // 2, w // 2, c, 2, 2)
            return rows.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c, f, h, w), taps

    def call(block: nn.Module, x: Tensor, per_token: Mapping[str, Tensor], shared: Any) -> Tensor:
        out: Tensor = block(x, shared["extra"])
        return out

    with torch.random.fork_rng(devices=[]):
        network = Network()
    generator = rng.generator(seed, "tiny/weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    stack = BlockStack(network.blocks)
    return network, stack
