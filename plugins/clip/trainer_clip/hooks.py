"""What the trainer sees of the plugin: one encoder of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer_clip.config import ClipSettings
from trainer_clip.files import EncoderFiles, described, locate
from trainer_core.hookspecs import hookimpl
from trainer_core.run import IMAGE_EMBEDS_OF
from trainer_core.types import EncodedTensor, Encoder, EncoderSample, LoadedEncoder, PluginInfo

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_clip.sketch import SketchedImages
    from trainer_clip.vision import ImageEncoder
    from trainer_core.planner.sketch import Sketch
    from trainer_core.run import Run

ENCODER = "clip.vision"
PLACES = {"first": 0, "last": -1}


class Clip:
    """Writes ``image_embeds`` (L, D), the hidden states of the frames that a model is given."""

    info = PluginInfo(
        summary="CLIP image encoder of the Wan 2.1 image-to-video models; frames are encoded once",
        settings=ClipSettings,
        provides=("image_encoder",),
        serves=(
            "model_flavour=i2v-14b-2.1",
            "model_flavour=i2v-14b-2.1-720p",
            "model_flavour=flf2v-14b-2.1",
        ),
    )

    def __init__(self, settings: ClipSettings | None = None) -> None:
        self.settings = settings or ClipSettings()

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the encoder of frames, none where the model takes no image embeddings."""
        frames = run.state.get(IMAGE_EMBEDS_OF, ())
        if not frames:
            run.say_once(f"clip has no effect: {run.spec.name} takes no image embeddings")
            return []
        return [
            Encoder(
                name=ENCODER,
                reads="pixels",
                writes=(EncodedTensor("image_embeds"),),
                identity=partial(self._identity, run),
                load=partial(self._load, run),
                keep="image_embeds",
                sketch=partial(self._sketch, run),
            )
        ]

    @hookimpl
    def encode_batch(
        self, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return ``image_embeds`` of each clip's given frames."""
        if encoder.name != ENCODER:
            return None
        network: ImageEncoder = encoder.network
        places = [PLACES[frame] for frame in run.state[IMAGE_EMBEDS_OF]]
        clips = [sample.pixels for sample in samples if sample.pixels is not None]
        # one clip at a time: the last bits depend on how many images go in together
        return [{"image_embeds": network.embed(clip[places])} for clip in clips]

    def _files(self, run: Run) -> EncoderFiles:
        own = self.settings.clip_pretrained_model_name_or_path
        return locate(own, run.settings.pretrained_model_name_or_path)

    def _identity(self, run: Run) -> dict[str, Any]:
        files = self._files(run)
        return {
            "files": {path.name: run.file_digest(path) for path in files.parts()},
            "frames": list(run.state[IMAGE_EMBEDS_OF]),
            "dtype": "float32",
        }

    def _sketch(self, run: Run, builder: Sketch) -> SketchedImages:
        from trainer_clip import sketch

        own = self.settings.clip_pretrained_model_name_or_path
        return sketch.build(builder, described(own, run.settings.pretrained_model_name_or_path))

    def _load(self, run: Run) -> ImageEncoder:
        from trainer_clip.vision import load

        files = self._files(run)
        return load(files.model, files.processor, device=run.device)
