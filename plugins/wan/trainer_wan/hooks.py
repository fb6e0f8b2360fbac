"""What the trainer sees of the plugin."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.capabilities import Blocks, CountedBlocks, NativeNames, SamplingGrid, TokenGrid
from trainer_core.errors import ConfigError, Problem
from trainer_core.files import digest_json, replace_folder
from trainer_core.hookspecs import hookimpl
from trainer_core.run import IMAGE_EMBEDS_OF
from trainer_core.types import (
    Artifact,
    EncodedTensor,
    Encoder,
    EncoderSample,
    LoadedEncoder,
    ModelSpec,
    Moment,
    PluginInfo,
)
from trainer_wan import attention
from trainer_wan.checks import (
    check_keys,
    check_repo,
    check_rest,
    check_vae,
    check_weights,
    check_whole,
)
from trainer_wan.config import WanSettings, chunk_of
from trainer_wan.experts import check_names, check_weights_apart
from trainer_wan.flavours import Flavour, Shape, choose
from trainer_wan.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.planner.occasion import Occasion
    from trainer_core.planner.sketch import Sketch
    from trainer_core.run import Run
    from trainer_wan.model import WanModel
    from trainer_wan.sampling import Given

VAE, CONDITION = "wan.vae", "wan.condition"
PIPELINE = "pipeline"


class Wan:
    """Trains the video models of Wan 2.1 and 2.2, as diffusers stores them."""

    info = PluginInfo(
        summary="Wan 2.1 and 2.2 video models: text, image, first and last frame to video",
        settings=WanSettings,
        provides=("model",),
        values=("model_family=wan",),
        requires=("umt5",),
        exposes=(Blocks, TokenGrid, CountedBlocks, SamplingGrid, NativeNames),
    )

    def __init__(self, settings: WanSettings | None = None) -> None:
        self.settings = settings or WanSettings()
        self._weights: Weights | None = None
        self._given: Given | None = None

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """Return the flavour's facts; a folder's or known repository's weights are checked here."""
        flavour = choose(run.settings.model_flavour)
        check_keys(
            flavour,
            self.settings,
            model_type=run.settings.model_type,
        )
        weights = self._locate(run)
        check_names(flavour, weights)
        both = {
            "model_type = full": run.settings.model_type == "full",
            "wan_validation_load_other_stage": self.settings.wan_validation_load_other_stage,
        }
        check_whole(flavour, weights, needed=[key for key, asks in both.items() if asks])
        boundary = num_blocks = None
        if self._is_known(flavour, weights):
            num_blocks = flavour.shape.num_layers
        elif weights.is_local:
            self._check(flavour, weights)
            shapes = [Shape.of(weights.config(role)) for role in flavour.roles]
            num_blocks = min(shape.num_layers for shape in shapes)
            boundary = weights.index().get("boundary_ratio")
        elif flavour.stage is not None:
            boundary = weights.index().get("boundary_ratio")
        if flavour.uses_clip:
            run.state[IMAGE_EMBEDS_OF] = flavour.given_frames
        return flavour.spec(
            model_type=run.settings.model_type, boundary=boundary, num_blocks=num_blocks
        )

    def check(self, run: Run) -> None:
        """Refuse what cannot be computed here; say what is computed otherwise than asked."""
        chunk, said = chunk_of(self.settings)
        if chunk and run.settings.compile_blocks:
            problem = Problem(
                "compile_blocks",
                "a compiled block is one piece, and the feed-forward is to be computed in chunks.",
                value=True,
                way_out="Remove compile_blocks or enable_chunked_feed_forward.",
            )
            raise ConfigError([problem])
        slicing = None
        if self.settings.vae_enable_slicing and run.settings.vae_batch_size == 1:
            slicing = "vae_enable_slicing has no effect: it acts with vae_batch_size above 1 only"
        for sentence in (said, slicing, attention.check(self.settings.attention_mechanism)):
            if sentence is not None:
                run.say_once(sentence)

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the VAE, which writes ``latents`` (C, f, h, w) float32, normalised, and what makes
        the model's view of given frames of them.
        """
        check_rest(self.settings, blocks_move=run.placement.blocks is not None)
        flavour = choose(run.settings.model_flavour)
        found = [self._encoder(run, VAE, "latents", {})]
        if frames := flavour.given_frames:
            facts = {"frames": list(frames), "form": "mask and latents"}
            found.append(self._encoder(run, CONDITION, "condition", facts))
        elif flavour.task == "ti2v" and self.settings.wan_first_frame_probability > 0:
            found.append(self._encoder(run, CONDITION, "first_frame", {"form": "first frame"}))
        return found

    def _encoder(self, run: Run, name: str, writes: str, facts: Mapping[str, Any]) -> Encoder:
        return Encoder(
            name=name,
            reads="pixels",
            writes=(EncodedTensor(writes),),
            identity=lambda: {**self._identity(run), **facts},
            load=partial(self._load_vae, run),
            batch_size=run.settings.vae_batch_size,
            sketch=partial(self._sketch_vae, run),
        )

    @hookimpl
    def encode_batch(
        self, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return ``latents``, ``condition`` or ``first_frame`` of each clip."""
        if encoder.name not in (VAE, CONDITION):
            return None
        from trainer_wan import condition, vae

        clips = [sample.pixels for sample in samples if sample.pixels is not None]
        if encoder.name == VAE:
            return [{"latents": latents} for latents in vae.encode(encoder.network, clips)]
        frames = choose(run.settings.model_flavour).given_frames
        if not frames:
            return [{"first_frame": condition.first_frame(encoder.network, clip)} for clip in clips]
        last = "last" in frames
        found = [condition.concatenated(encoder.network, clip, last=last) for clip in clips]
        return [{"condition": tensor} for tensor in found]

    @hookimpl
    def load_model(self, run: Run) -> WanModel:
        """Return the transformers behind their block runner, at ``run.placement``."""
        if run.sketch is not None:
            return self._sketch_model(run)
        from trainer_wan.model import load

        weights, flavour = self._fitting(run), choose(run.settings.model_flavour)
        if untold := check_weights_apart(flavour, weights):
            run.say_once(untold)
        base = None
        if weights.has_own_transformer and self.settings.wan_force_2_1_time_embedding:
            base = weights.transformer(flavour.roles[0], own=False)
        model = load(
            [weights.transformer(role) for role in flavour.roles],
            spec=run.spec,
            placement=run.placement,
            train_all=run.settings.model_type == "full",
            scheduler=weights.config("scheduler"),
            base=base,
            one_time=self.settings.wan_force_2_1_time_embedding,
            draw_given=partial(self._draw_given, run),
            say=run.say_once,
        )
        chunk, _ = chunk_of(self.settings)
        for role, transformer in model.modules.items():
            model.bare(role).chunk_feed_forward(chunk)
            attention.use(transformer, self.settings.attention_mechanism, **_place(run))
        return model

    def _draw_given(self, run: Run, moment: Moment, num_samples: int) -> Tensor:
        """Return which clips of a micro-batch have their first frame given, (B,) bool."""
        import torch

        generator = run.generator("wan/first_frame", moment=moment)
        drawn = torch.rand(num_samples, generator=generator)
        return drawn < self.settings.wan_first_frame_probability

    def resting_bytes(self, run: Run) -> int:
        """Return the frozen bytes of the expert that rests in host memory, for ``trainer plan``."""
        from trainer_core.planner.live import num_bytes

        model: Any = run.model
        if not self._rests(model):
            return 0
        return min(
            num_bytes(p for p in module.parameters() if not p.requires_grad)
            for module in model.modules.values()
        )

    def occasions(self, run: Run) -> Iterator[Occasion]:
        """Yield what rendering the prompts takes, for ``trainer plan``."""
        from trainer_wan import sketch

        if run.prompts and run.settings.validation_step_interval:
            flavour = choose(run.settings.model_flavour)
            yield from sketch.samples(run, flavour, self._told(run, flavour), self.settings)

    def _rests(self, model: Any) -> bool:
        return self.settings.wan_one_expert_resident and len(model.modules) > 1

    def attach(self, run: Run) -> None:
        """Lay one of two experts to rest, now that adapters are in; say what images teach."""
        model: Any = run.model
        if self._rests(model) and run.sketch is None:
            from trainer_wan.resting import Resting

            networks = {role: model.bare(role) for role in model.modules}
            Resting(networks, device=run.device)
        flavour = choose(run.settings.model_flavour)
        if flavour.given_frames and any(shape[0] == 1 for shape in run.clip_shapes):
            run.say_once(
                f"clips of one frame: {run.spec.name} is given that very frame, so that they teach it "
                "little; videos or a text-to-video flavour teach more"
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
        """Return one clip for each of ``run.prompts``."""
        if not run.prompts:
            return []
        from trainer_wan.validation import given_for, render

        weights, flavour = self._fitting(run), choose(run.settings.model_flavour)
        if self._given is None:
            self._given = given_for(run, self.settings, flavour, weights.config("scheduler"))
        return render(run, weights, self.settings, flavour, self._given)

    def _locate(self, run: Run) -> Weights:
        """Return the files that the settings choose."""
        flavour = choose(run.settings.model_flavour)
        source = run.settings.pretrained_model_name_or_path or flavour.repo
        if self._weights is None or self._weights.source != source:
            self._weights = Weights(
                source,
                transformer=self.settings.pretrained_transformer_model_name_or_path,
                subfolder=self.settings.pretrained_transformer_subfolder,
                vae=self.settings.pretrained_vae_model_name_or_path,
            )
        return self._weights

    def _fitting(self, run: Run) -> Weights:
        """Return the files after making sure that they are what the flavour says."""
        weights = self._locate(run)
        flavour = choose(run.settings.model_flavour)
        if not self._is_known(flavour, weights):
            self._check(flavour, weights)
        return weights

    @staticmethod
    def _is_known(flavour: Flavour, weights: Weights) -> bool:
        """Return whether the pipeline's name alone says that all fits."""
        replaced = weights.has_own_transformer or weights.vae_repo is not None
        return not weights.is_local and check_repo(flavour, weights.source) and not replaced

    @staticmethod
    def _check(flavour: Flavour, weights: Weights) -> None:
        for role in flavour.roles:
            key, source = weights.named(role)
            config, index = weights.config(role), weights.index()
            check_weights(flavour, config=config, index=index, source=source, key=key)
        check_vae(flavour, weights.config("vae"), weights)

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

    def _sketch_model(self, run: Run) -> WanModel:
        from trainer_wan import sketch

        flavour = choose(run.settings.model_flavour)
        return sketch.model(
            run,
            flavour,
            self._told(run, flavour),
            one_time=self.settings.wan_force_2_1_time_embedding,
        )

    def _sketch_vae(self, run: Run, builder: Sketch) -> Any:
        from trainer_wan import sketch

        flavour = choose(run.settings.model_flavour)
        return sketch.vae(builder, flavour, self._told(run, flavour))

    def _told(self, run: Run, flavour: Flavour) -> Weights | None:
        """Return files whose configurations have to be read; None where the flavour says all."""
        weights = self._locate(run)
        return None if self._is_known(flavour, weights) else weights

    def _load_vae(self, run: Run) -> Any:
        from trainer_wan import vae

        return vae.load(
            self._fitting(run).component("vae"),
            device=run.device,
            tiling=self.settings.vae_enable_tiling,
            slicing=self.settings.vae_enable_slicing,
        )


def _place(run: Run) -> dict[str, Any]:
    return {"device": run.device, "dtype": run.placement.dtype}
