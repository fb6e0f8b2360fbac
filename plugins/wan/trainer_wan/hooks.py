"""What the trainer sees of the plugin."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.capabilities import Blocks, CountedBlocks, SamplingGrid, TokenGrid
from trainer_core.files import digest_json, replace_folder
from trainer_core.hookspecs import hookimpl
from trainer_core.run import DROP_VAE_ENCODER, MODEL_ASIDE
from trainer_core.types import (
    Artifact,
    EncodedTensor,
    Encoder,
    EncoderSample,
    LoadedEncoder,
    ModelSpec,
    PluginInfo,
)
from trainer_wan.config import WanSettings
from trainer_wan.flavours import Flavour, Shape, check_repo, check_weights, choose
from trainer_wan.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run
    from trainer_wan.model import WanModel

VAE = "wan.vae"
PIPELINE = "pipeline"


class Wan:
    """Trains the text-to-video models of Wan 2.1, as diffusers stores them."""

    info = PluginInfo(
        summary="Wan video models: T2V 1.3B and 14B of Wan 2.1",
        settings=WanSettings,
        provides=("model",),
        values=("model_family=wan",),
        requires=("umt5",),
        exposes=(Blocks, TokenGrid, CountedBlocks, SamplingGrid),
    )

    def __init__(self, settings: WanSettings | None = None) -> None:
        self.settings = settings or WanSettings()
        self._weights: Weights | None = None

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """Return the flavour's facts; a folder's or known repository's weights are checked here."""
        flavour = choose(run.settings.model_flavour)
        weights = self._locate(run)
        if self.settings.vae_enable_slicing and run.settings.vae_batch_size == 1:
            run.say("vae_enable_slicing has no effect: it acts with vae_batch_size above 1 only")
        num_blocks = None
        if weights.is_local:
            self._check(flavour, weights)
            num_blocks = Shape.of(weights.config("transformer")).num_layers
        elif check_repo(flavour, weights.source):
            num_blocks = flavour.shape.num_layers
        return flavour.spec(model_type=run.settings.model_type, num_blocks=num_blocks)

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the VAE, which writes ``latents`` (C, f, h, w) float32, normalised."""
        return [
            Encoder(
                name=VAE,
                reads="pixels",
                writes=(EncodedTensor("latents"),),
                identity=partial(self._identity, run),
                load=partial(self._load_vae, run),
                batch_size=run.settings.vae_batch_size,
            )
        ]

    @hookimpl
    def encode_batch(
        self, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return ``latents`` of each clip."""
        if encoder.name != VAE:
            return None
        from trainer_wan import vae

        clips = [sample.pixels for sample in samples if sample.pixels is not None]
        return [{"latents": latents} for latents in vae.encode(encoder.network, clips)]

    @hookimpl
    def load_model(self, run: Run) -> WanModel:
        """Return the transformer behind its block runner, at ``run.placement``."""
        from trainer_wan.model import load

        weights = self._fitting(run)
        return load(
            weights.component("transformer"),
            spec=run.spec,
            placement=run.placement,
            train_all=run.settings.model_type == "full",
            checkpointing=run.settings.gradient_checkpointing,
            scheduler=weights.config("scheduler"),
        )

    @hookimpl
    def save_weights(self, run: Run, folder: Path, final: bool) -> Sequence[str] | None:
        """Write all weights in diffusers' layout, at the end the pipeline; None for an adapter."""
        if run.settings.model_type != "full":
            return None
        from trainer_wan.export import write_pipeline, write_transformer

        trained = dict(run.model.modules)
        if final:
            work = folder / f".{PIPELINE}.writing"
            shutil.rmtree(work, ignore_errors=True)
            names = write_pipeline(work, weights=self._locate(run), trained=trained)
            replace_folder(work, folder / PIPELINE)
            return [f"{PIPELINE}/{name}" for name in names]
        files: list[str] = []
        for role, transformer in trained.items():
            files += write_transformer(folder, role=role, transformer=transformer)
        return files

    @hookimpl
    def load_weights(self, run: Run, folder: Path) -> bool | None:
        """Restore what :meth:`save_weights` wrote; None for an adapter."""
        if run.settings.model_type != "full":
            return None
        from trainer_wan.export import read_transformer

        for role, transformer in run.model.modules.items():
            read_transformer(folder / role, transformer)
        return True

    @hookimpl
    def validate(self, run: Run) -> Sequence[Artifact]:
        """Return one clip for each of ``run.prompts``; the VAE is loaded for decoding alone."""
        if not run.prompts:
            return []
        from trainer_wan import vae
        from trainer_wan.sampling import sample_latents, settle

        weights = self._locate(run)
        scheduler = weights.config("scheduler")
        sampling = settle(run, scheduler)
        negative = None
        if sampling.guidance > 1:
            text = run.settings.validation_negative_prompt
            negative = run.encoded_caption(text)["text_embeds"]
        model: Any = run.model
        clips = sample_latents(
            model.bare(run.spec.experts[0].role),
            [run.encoded_caption(prompt.text)["text_embeds"] for prompt in run.prompts],
            negative=negative,
            sampling=sampling,
            scheduler_config=scheduler,
            device=run.device,
        )
        with run.state.get(MODEL_ASIDE, nullcontext)():
            decoder = vae.load(
                weights.component("vae"),
                device=run.device,
                decoder_only=run.state.get(DROP_VAE_ENCODER, False),
                tiling=self.settings.vae_enable_tiling,
            )
            return [
                Artifact(
                    name=prompt.name,
                    frames=vae.decode(decoder, latents).numpy(),
                    fps=run.spec.fps,
                    caption=prompt.text,
                )
                for prompt, latents in zip(run.prompts, clips, strict=True)
            ]

    def _locate(self, run: Run) -> Weights:
        """Return the files that the settings choose."""
        flavour = choose(run.settings.model_flavour)
        source = run.settings.pretrained_model_name_or_path or flavour.repo
        if self._weights is None or self._weights.source != source:
            self._weights = Weights(source)
        return self._weights

    def _fitting(self, run: Run) -> Weights:
        """Return the files after making sure that they are what the flavour says."""
        weights = self._locate(run)
        flavour = choose(run.settings.model_flavour)
        if weights.is_local or not check_repo(flavour, weights.source):
            self._check(flavour, weights)
        return weights

    @staticmethod
    def _check(flavour: Flavour, weights: Weights) -> None:
        config, index = weights.config("transformer"), weights.index()
        check_weights(flavour, config=config, index=index, source=weights.source)

    def _identity(self, run: Run) -> dict[str, Any]:
        from trainer_wan import vae

        weights = self._fitting(run)
        return {
            "weights": weights.digest("vae", of=run.file_digest),
            "config": digest_json(vae.facts(weights.config("vae"))),
            "posterior": "mode",
            "dtype": "float32",
            **({"tiling": True} if self.settings.vae_enable_tiling else {}),
        }

    def _load_vae(self, run: Run) -> Any:
        from trainer_wan import vae

        return vae.load(
            self._fitting(run).component("vae"),
            device=run.device,
            tiling=self.settings.vae_enable_tiling,
            slicing=self.settings.vae_enable_slicing,
        )
