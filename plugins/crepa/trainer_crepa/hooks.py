"""What the trainer sees of the plugin: a teacher whose features are cached, a tap, and a loss term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer_core import rng
from trainer_core.capabilities import Blocks, TokenGrid
from trainer_core.errors import ConfigError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.run import DROP_VAE_ENCODER
from trainer_core.types import (
    Batch,
    EncodedTensor,
    Encoder,
    EncoderSample,
    LoadedEncoder,
    LossTerm,
    ModelInputs,
    ParameterGroup,
    PluginInfo,
    StepOutput,
)
from trainer_crepa.config import CrepaSettings
from trainer_crepa.cutoff import Cutoff
from trainer_crepa.files import TeacherFiles
from trainer_crepa.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run
    from trainer_crepa.alignment import Projector
    from trainer_crepa.teacher import Teacher

TEACHER, FEATURES = "crepa.teacher", "crepa_features"


def readable(num_bytes: float) -> str:
    """Return a number of bytes in kB, MB or GB (powers of 1000), three digits."""
    exponent, unit = next(
        (e, u) for e, u in ((9, "GB"), (6, "MB"), (3, "kB")) if num_bytes >= 10**e or e == 3
    )
    return f"{num_bytes / 10**exponent:.3g} {unit}"


class Crepa:
    """Aligns the hidden states of one block with a frozen image encoder's features of near frames."""

    info = PluginInfo(
        summary="CREPA: hidden states aligned with DINOv2 features of each frame and its neighbours",
        settings=CrepaSettings,
        switch="crepa_enabled",
        requires=(Blocks, TokenGrid),
    )

    def __init__(self, settings: CrepaSettings) -> None:
        self.settings = settings
        self.files = TeacherFiles(settings.crepa_encoder)
        self.cutoff = Cutoff(
            threshold=settings.crepa_similarity_threshold,
            decay=settings.crepa_similarity_ema_decay,
            recovers=settings.crepa_threshold_mode == "recoverable",
        )
        self._projector: Projector | None = None
        self._tap: int | None = None

    def check(self, run: Run) -> None:
        """Refuse a block that the model does not have, and a teacher that cannot be one."""
        if not self.settings.acts:
            return
        if run.spec.num_blocks is not None:
            self._block(run.spec.num_blocks)
        self.files.check()

    def encoders(self, run: Run) -> Sequence[Encoder]:
        """Return the teacher, which writes ``crepa_features`` (T, h, w, C) bfloat16 for each clip."""
        if not self.settings.acts:
            return []
        run.say_once(self._space(run))
        return [
            Encoder(
                name=TEACHER,
                reads="pixels",
                writes=(EncodedTensor(FEATURES),),
                identity=partial(self._identity, run),
                load=partial(self._load, run),
            )
        ]

    @hookimpl
    def encode_batch(
        self, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Return the features of each clip."""
        if encoder.name != TEACHER:
            return None
        from trainer_crepa import teacher

        network: Teacher = encoder.network
        return [
            {
                FEATURES: teacher.features(
                    network,
                    sample.pixels,
                    stride=run.spec.frame_stride,
                    tokens=self._tokens(run, *sample.pixels.shape[-2:]),
                    image_size=self.settings.crepa_encoder_image_size,
                    at_once=self.settings.crepa_encoder_frames_batch_size,
                )
            }
            for sample in samples
            if sample.pixels is not None
        ]

    def attach(self, run: Run) -> None:
        """Ask for the tap, make the projector, and leave the VAE's encoder out of what comes."""
        settings = self.settings
        if settings.crepa_drop_vae_encoder:
            run.state[DROP_VAE_ENCODER] = True
        if not settings.acts:
            run.say("crepa aligns nothing: crepa_weight is 0")
            return
        assert isinstance(run.model, Blocks)  # the plugin requires it
        num_blocks = min(len(stack) for stack in run.model.stacks().values())
        self._tap = run.request_tap(self._block(num_blocks))
        self._projector = self._new_projector(run, run.model.hidden_size)
        self.schedule = Schedule(
            weight=settings.crepa_weight,
            end=settings.crepa_lambda_end,
            course=settings.crepa_scheduler,
            warm_up=settings.crepa_warmup_steps,
            decay_end=settings.crepa_decay_steps or (run.settings.length[0] or 0),
            power=settings.crepa_power,
            cutoff=settings.crepa_cutoff_step,
        )
        run.say(
            f"crepa aligns block {self._tap} of {num_blocks} with {settings.crepa_encoder}, each frame "
            f"and its neighbours up to {settings.crepa_adjacent_distance} latent frames away, weight "
            f"{settings.crepa_weight:g}"
        )

    def parameters(self) -> Sequence[ParameterGroup]:
        """Return the projector, whatever the adapter is."""
        if self._projector is None:
            return []
        named = list(self._projector.named_parameters())
        return [ParameterGroup("crepa", named, self.settings.crepa_learning_rate)]

    @hookimpl
    def prepare_inputs(self, run: Run, inputs: ModelInputs) -> ModelInputs:
        """End the tap and the reading of features where CREPA is over; change nothing."""
        if self._tap is not None:
            over = self.schedule.is_over(inputs.moment.step - 1)
            looks = (
                inputs.moment.micro == 0
                and not (inputs.moment.step - 1) % run.settings.log_step_interval
            )
            if over or (looks and self.cutoff.is_final()):
                run.taps.discard(self._tap)
                run.idle_encoders.add(TEACHER)
                run.say(f"crepa is over after {inputs.moment.step - 1} steps")
                self._tap = None
        return inputs

    @hookimpl
    def compute_loss(self, run: Run, batch: Batch, output: StepOutput) -> LossTerm | None:
        """Return minus the weighted score, and how similar the frames are."""
        if self._tap is None or self._projector is None:
            return None
        from trainer_crepa import alignment

        assert isinstance(run.model, TokenGrid)  # the plugin requires it
        settings, tap = self.settings, output.taps[self._tap]
        _, rows, columns = run.model.token_grid(tuple(output.inputs.x_t.shape))
        teacher = alignment.on_grid(batch.conditioning[FEATURES], rows, columns)
        found = alignment.score(
            self._projector(tap.tokens),
            teacher,
            alignment.neighbours(
                settings.crepa_adjacent_distance,
                settings.crepa_temporal_decay,
                cumulative=settings.crepa_cumulative_neighbors,
            ),
            ids=tap.ids,
            normalise=settings.crepa_normalize_neighbour_sum,
            mean_over_frames=settings.crepa_normalize_by_frames,
            by_token=settings.crepa_spatial_align,
        )
        weight = self.schedule.at(output.inputs.moment.step - 1)
        gate = self.cutoff.update(found.similarity.mean())
        value = -weight * gate * found.value
        metrics = {
            "crepa/similarity": found.similarity.mean(),
            "crepa/score": found.normalised.mean(),
            "crepa/weight": weight * gate,
        }
        return LossTerm("crepa", value, metrics)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return what the cutoff remembers; core keeps the projector."""
        return self.cutoff.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        if self._projector is not None:
            self.cutoff.load_state_dict(state, device=self._projector.linear.weight.device)

    def _block(self, num_blocks: int) -> int:
        index = self.settings.crepa_block_index
        if not -num_blocks <= index < num_blocks:
            raise ConfigError(
                [
                    Problem(
                        "crepa_block_index",
                        f"is not in the model, which has {num_blocks} blocks, 0 to {num_blocks - 1}.",
                        value=index,
                        way_out=f"Take one near a third of the depth, such as {num_blocks // 3}.",
                    )
                ]
            )
        return index % num_blocks

    def _new_projector(self, run: Run, width: int) -> Projector:
        import torch

        from trainer_crepa.alignment import Projector

        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(rng.seed_of(run.seed, "crepa/projector"))
            return Projector(width, self.files.width()).to(run.device)

    @staticmethod
    def _tokens(run: Run, height: int, width: int) -> tuple[int, int]:
        _, patch_height, patch_width = run.spec.patch
        return height // patch_height, width // patch_width

    def _space(self, run: Run) -> str:
        """Return what the features of the planned clips take on the disk, uncompressed."""
        from trainer_crepa.teacher import grid_for, kept_grid

        total, size = 0, self.settings.crepa_encoder_image_size
        for (frames, height, width), count in run.clip_shapes.items():
            tokens = self._tokens(run, height, width)
            grid = kept_grid(tokens, grid_for(*tokens, image_size=size, patch=self.files.patch()))
            latent_frames = (frames - 1) // run.spec.frame_stride + 1
            total += count * latent_frames * grid[0] * grid[1] * self.files.width() * 2
        num = sum(run.clip_shapes.values())
        return (
            f"crepa keeps features of {num} clips in the cache, {readable(total)} in all; "
            "what is there already is used again"
        )

    def _identity(self, run: Run) -> dict[str, Any]:
        folder = self.files.folder()
        paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        return {
            "files": {path.name: run.file_digest(path) for path in paths},
            "image_size": self.settings.crepa_encoder_image_size,
            "frames": f"every {run.spec.frame_stride}, from 0",
            "tokens": f"patches, for model tokens of {list(run.spec.patch)[1:]} pixels",
            "dtype": "float32, kept as bfloat16",
            "at_once": self.settings.crepa_encoder_frames_batch_size,
            "version": 1,
        }

    def _load(self, run: Run) -> Teacher:
        from trainer_crepa import teacher

        return teacher.load(self.files.folder(), self.files.config(), device=run.device)
