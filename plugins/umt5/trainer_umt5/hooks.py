"""What the trainer sees of the plugin: one encoder of captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer_core.errors import ModelError
from trainer_core.hookspecs import hookimpl
from trainer_core.run import QUANTISE_ENCODER
from trainer_core.types import EncodedTensor, Encoder, EncoderSample, LoadedEncoder, PluginInfo
from trainer_umt5.config import Umt5Settings
from trainer_umt5.files import DEFAULT_REPO, EncoderFiles, described, locate
from trainer_umt5.text import CLEANING, MAX_TOKENS, TextEncoder, load

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.planner.sketch import Sketch
    from trainer_core.run import Run
    from trainer_umt5.sketch import SketchedText

ENCODER = "umt5.text"


class Umt5:
    """Writes ``text_embeds`` (L, D), the caption's hidden states without padding."""

    info = PluginInfo(
        summary="UMT5 text encoder of the Wan models; captions are encoded once and cached",
        settings=Umt5Settings,
        provides=("umt5",),
    )

    def __init__(self, settings: Umt5Settings | None = None) -> None:
        self.settings = settings or Umt5Settings()

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the encoder of captions; nothing is read or downloaded yet."""
        return [
            Encoder(
                name=ENCODER,
                reads="caption",
                writes=(EncodedTensor("text_embeds", pad_to=MAX_TOKENS),),
                identity=partial(self._identity, run),
                load=partial(self._load, run),
                # Captions pass the network one by one whatever the group, so no bit depends on it.
                batch_size=run.settings.write_batch_size,
                sketch=partial(self._sketch, run),
                quantised=True,
            )
        ]

    @hookimpl
    def encode_batch(
        self, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return ``text_embeds`` of each caption."""
        if encoder.name != ENCODER:
            return None
        network: TextEncoder = encoder.network
        return [{"text_embeds": network.embed(sample.caption or "")} for sample in samples]

    def _files(self, run: Run) -> EncoderFiles:
        return locate(self._named(run))

    def _named(self, run: Run) -> str:
        name = self.settings.pretrained_t5_model_name_or_path
        return name or run.settings.pretrained_model_name_or_path or DEFAULT_REPO

    def _identity(self, run: Run) -> dict[str, Any]:
        import ftfy

        identity = {
            "files": {path.name: run.file_digest(path) for path in self._files(run).parts()},
            "dtype": str(run.placement.dtype).removeprefix("torch."),
            "max_tokens": MAX_TOKENS,
            "cleaning": f"{CLEANING}, ftfy {ftfy.__version__}",
        }
        quantiser = run.state.get(QUANTISE_ENCODER, None)
        return identity if quantiser is None else {**identity, "weights": quantiser.identity}

    def _load(self, run: Run) -> TextEncoder:
        import torch

        files, quantiser = self._files(run), run.state.get(QUANTISE_ENCODER, None)
        device = run.device if quantiser is None else torch.device("cpu")
        network, missing = load(
            files.model, files.tokenizer, dtype=run.placement.dtype, device=device
        )
        if missing:
            raise ModelError(
                f"the text encoder in {files.model} lacks {len(missing)} weights, such as "
                f"{missing[0]}. Download it again, or set pretrained_t5_model_name_or_path to "
                f"{DEFAULT_REPO}."
            )
        if quantiser is not None:
            network = replace(network, model=quantiser.apply(network.model))
        return network

    def _sketch(self, run: Run, builder: Sketch) -> SketchedText:
        from trainer_umt5 import sketch

        model = described(self._named(run))
        network = sketch.build(builder, model, dtype=run.placement.dtype)
        quantiser = run.state.get(QUANTISE_ENCODER, None)
        return (
            network if quantiser is None else replace(network, model=quantiser.apply(network.model))
        )
