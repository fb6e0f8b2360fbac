"""The keys that core owns, by theme. ``run.settings`` is a :class:`CoreSettings`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trainer_core.settings.arguments import parse_arguments
from trainer_core.settings.keys import PluginSettings, key

CropStyle = Literal["center", "random", "corner"]
CropAspect = Literal["square", "preserve", "random", "closest"]
ResolutionType = Literal["pixel", "area", "pixel_area"]
BUILTIN_OPTIMIZERS = ("adamw", "adamw_bf16", "optimi-adamw", "optimi-lion", "optimi-stableadamw")


def _words(value: Any) -> Any:
    """Split "a,b" into a list; leave lists alone."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class RunKeys(PluginSettings):
    """Length, place and reporting of a run."""

    plugins: Words | None = key(
        None, "Plugins of the run. Without it they are inferred from the keys.", free=True
    )
    output_dir: str = key("output", "Folder that the run writes to.", free=True)
    seed: int = key(42, "Every random draw derives from it.", ge=0)
    max_train_steps: int = key(
        0, "Optimiser steps; 0 takes num_train_epochs.", unit="steps", free=True, ge=0
    )
    num_train_epochs: int = key(
        1, "Passes over the data; 0 takes max_train_steps.", unit="epochs", free=True, ge=0
    )
    ignore_final_epochs: bool = key(
        False,
        "With both lengths given: go on past num_train_epochs until max_train_steps is reached.",
        free=True,
    )
    checkpoint_step_interval: int = key(
        500,
        "Write a checkpoint every so many steps; 0: only at the end.",
        unit="steps",
        free=True,
        ge=0,
    )
    checkpoints_total_limit: int = key(
        5, "Keep the newest so many checkpoints; 0 keeps all.", free=True, ge=0
    )
    resume_from_checkpoint: str = key(
        "latest",
        'Checkpoint to go on from: "latest", a folder, or "none" to start afresh.',
        free=True,
    )
    report_to: Words = key(
        ("none",), "Trackers, one or several; none for the event log alone.", free=True
    )
    tracker_project_name: str = key(
        "trainer", "Project that trackers file the run under.", free=True
    )
    tracker_run_name: str | None = key(
        None, "Name of the run in trackers; the output folder's name without it.", free=True
    )
    log_step_interval: int = key(
        10, "Read scalars from the device every so many steps.", unit="steps", free=True, ge=1
    )
    device: str = key(
        "auto",
        'Where to train: "auto" takes CUDA, then MPS, then the CPU; or a torch device.',
        free=True,
    )


class ModelKeys(PluginSettings):
    """Which weights are trained, and what of them."""

    model_family: str | None = key(None, "Family of the model, such as wan.")
    model_flavour: str | None = key(None, "Member of the family; its plugin lists them.")
    model_type: Literal["lora", "full"] = key("lora", "Train an adapter, or all weights.")
    lora_type: str = key("standard", "Kind of adapter; its plugin provides it.")
    base_model_precision: str = key(
        "no_change", "Storage of the blocks' frozen weights: no_change, or the value of a plugin."
    )
    base_model_default_dtype: Literal["bf16", "fp32"] | None = key(
        None,
        "With base_model_precision: storage of the frozen weights that it leaves alone; without it "
        "mixed_precision decides.",
    )
    quantize_via: Literal["cpu", "accelerator"] = key(
        "accelerator",
        "With base_model_precision: where weights are quantised, block by block; the accelerator "
        "never holds more than one block that is not.",
    )
    text_encoder_1_precision: str = key(
        "no_change", "Storage of the text encoder's weights: no_change, or the value of a plugin."
    )
    text_encoder_2_precision: Literal["no_change"] = key(
        "no_change", "No model here has a second text encoder, so there is nothing to change."
    )
    pretrained_model_name_or_path: str | None = key(
        None,
        "Hub repository or folder of the model; without it the flavour's repository.",
        free=True,
    )
    mixed_precision: Literal["no", "bf16"] = key(
        "bf16",
        "bf16: frozen weights and products in bfloat16, adapters in float32. no: all in float32.",
    )
    gradient_checkpointing: bool = key(
        True,
        "Recompute each block in the backward pass instead of keeping its activations.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    gradient_checkpointing_policy: Literal["full", "ffn", "keep_attention"] = key(
        "full",
        "What of a block is recomputed: all; its feed-forward; all but the output of self-attention, "
        "whose cost grows with the square of the tokens.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    memory_policy: Literal["manual", "auto"] = key(
        "manual",
        "auto: rehearse the step before the run and take the fastest of checkpointing policies and group "
        "offload that fits the device; it says which, and why. No result changes.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    gradient_checkpointing_interval: int = key(
        1,
        "Recompute every so many blocks only, the first one included; the others keep what they need.",
        unit="blocks",
        menu="Training → Memory Optimisation",
        free=True,
        ge=1,
    )
    compile_blocks: bool = key(
        False,
        "Compile a block with torch.compile, once for all blocks and all buckets; the first step takes "
        "a minute longer.",
        free=True,
    )

    @model_validator(mode="after")
    def _compiles_whole_blocks(self) -> ModelKeys:
        policy = self.gradient_checkpointing_policy
        if self.compile_blocks and self.gradient_checkpointing and policy != "full":
            raise ValueError(
                f"compile_blocks and gradient_checkpointing_policy {policy} exclude each other, since a "
                "compiled block is one piece; write full, or remove compile_blocks"
            )
        return self


class OptimizerKeys(PluginSettings):
    """Steps, learning rate and averaging."""

    train_batch_size: int = key(4, "Clips in a micro-batch.", unit="clips", ge=1)
    gradient_accumulation_steps: int = key(1, "Micro-batches in an optimiser step.", ge=1)
    optimizer: str = key("adamw", "Optimiser: one of core's, or the value of a plugin.")
    optimizer_config: str | None = key(
        None, 'Arguments of the optimiser, such as "weight_decay=0.01,betas=(0.9,0.99)".'
    )
    learning_rate: float = key(1e-4, "Learning rate after warm-up.", gt=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = key("constant_with_warmup", "Course of the learning rate after warm-up.")
    lr_warmup_steps: int = key(
        0, "Steps in which the learning rate rises from 0; constant ignores it.", unit="steps", ge=0
    )
    lr_num_cycles: int = key(1, "Restarts of cosine_with_restarts.", ge=1)
    lr_power: float = key(1.0, "Power of polynomial.", gt=0)
    lr_end: float = key(0.0, "Learning rate that linear, cosine and polynomial end at.", ge=0)
    max_grad_norm: float = key(1.0, "Bound of gradient clipping; 0 switches it off.", ge=0)
    grad_clip_method: Literal["value", "norm"] = key(
        "norm", "Clip each element (value) or the norm over all parameters (norm)."
    )
    use_ema: bool = key(False, "Keep an average of the trained weights, in float32.")
    ema_decay: float = key(0.995, "Share of the average that an update keeps.", ge=0, lt=1)
    ema_update_interval: int = key(1, "Update the average every so many steps.", unit="steps", ge=1)
    ema_validation: Literal["none", "ema_only", "comparison"] = key(
        "comparison", "Weights that validation renders: live, averaged, or both.", free=True
    )

    @model_validator(mode="after")
    def _falls(self) -> OptimizerKeys:
        if self.lr_end > self.learning_rate:
            raise ValueError(
                f"lr_end {self.lr_end} is above learning_rate {self.learning_rate}; lower it"
            )
        return self

    @field_validator("optimizer_config")
    @classmethod
    def _are_arguments(cls, value: str | None) -> str | None:
        parse_arguments(value)
        return value


class FlowKeys(PluginSettings):
    """Flow matching: how sigma is drawn."""

    flow_schedule_shift: float | None = key(
        None, "Shift k of the noise level, s' = k s / (1 + (k-1) s); none without it.", gt=0
    )
    flow_schedule_auto_shift: bool = key(
        False, "Shift by the number of spatial tokens, within the range of the scheduler."
    )
    flow_sigmoid_scale: float = key(1.0, "Scale of the normal draw before the sigmoid.", gt=0)
    flow_use_uniform_schedule: bool = key(False, "Draw sigma uniformly.")
    flow_use_beta_schedule: bool = key(False, "Draw sigma from a Beta distribution.")
    flow_beta_schedule_alpha: float = key(2.0, "First parameter of that distribution.", gt=0)
    flow_beta_schedule_beta: float = key(2.0, "Second parameter of that distribution.", gt=0)

    @model_validator(mode="after")
    def _one_schedule(self) -> FlowKeys:
        if self.flow_use_uniform_schedule and self.flow_use_beta_schedule:
            raise ValueError(
                "flow_use_uniform_schedule and flow_use_beta_schedule exclude each other; "
                "remove one of them"
            )
        if self.flow_schedule_auto_shift and self.flow_schedule_shift is not None:
            raise ValueError(
                "flow_schedule_auto_shift and flow_schedule_shift exclude each other; "
                "remove one of them"
            )
        return self


class DataKeys(PluginSettings):
    """Defaults of the datasets (an entry of the data backend file overrides them) and caching."""

    data_backend_config: str = key(
        "config/multidatabackend.json", "File that lists the datasets.", free=True
    )
    resolution: float = key(
        480, "Size of a clip: edge length in pixels, or megapixels with resolution_type area.", gt=0
    )
    resolution_type: ResolutionType = key(
        "pixel_area",
        "pixel: the shorter edge. area: megapixels. pixel_area: edge of a square of the same area.",
    )
    aspect_bucket_rounding: int = key(2, "Decimals that aspect ratios are rounded to.", ge=1, le=9)
    minimum_image_size: float | None = key(
        None, "Leave out media smaller than this, in the unit of resolution; 0 keeps all.", ge=0
    )
    maximum_image_size: float | None = key(
        None, "Resize media above this to target_downsample_size before cropping.", gt=0
    )
    target_downsample_size: float | None = key(
        None, "Size that maximum_image_size resizes to before cropping.", gt=0
    )
    caption_dropout_probability: float = key(
        0.1, "Share of samples trained with the empty caption.", ge=0, le=1
    )
    framerate: Annotated[float, Field(gt=0)] | Literal["source"] | None = key(
        None,
        'Frame rate of clips; the model\'s without it, "source" keeps every frame.',
        unit="fps",
    )
    disable_bucket_pruning: bool = key(
        False, "Keep buckets with fewer samples than a batch; they train in smaller batches."
    )
    vae_batch_size: int = key(
        1, "Clips that the VAE encodes at once.", unit="clips", ge=1, free=True
    )
    write_batch_size: int = key(
        128, "Captions that the text encoder takes at once at the most.", ge=1, free=True
    )
    delete_problematic_images: bool = key(
        False,
        "Delete media that could not be read in two runs; deleted.jsonl in cache_dir lists them.",
        free=True,
    )
    compress_disk_cache: bool = key(True, "Compress cache entries (zstandard).", free=True)
    cache_dir: str = key("cache", "Folder for what no dataset gives a folder for.", free=True)
    offload_during_startup: bool = key(
        True,
        "One heavy component on the accelerator at a time until training begins; it is always so.",
        free=True,
    )
    verify_cache: bool = key(
        False, "Digest sources and cache entries again before training.", free=True
    )

    @field_validator("offload_during_startup")
    @classmethod
    def _always(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "must be true: text encoder, VAE and model are never on the accelerator together "
                "before training begins. Remove it"
            )
        return value


class ValidationKeys(PluginSettings):
    """Samples and held-out loss on the way."""

    validation_prompt: str | None = key(None, "Prompt that is rendered.", free=True)
    validation_negative_prompt: str = key("", "What guidance leads away from.", free=True)
    validation_guidance: float = key(
        5.0, "Scale of classifier-free guidance; 1 is none.", free=True, ge=0
    )
    validation_num_inference_steps: int = key(30, "Denoising steps.", unit="steps", free=True, ge=1)
    validation_num_video_frames: int = key(
        81, "Frames of a sample.", unit="frames", free=True, ge=1
    )
    validation_resolution: str = key(
        "832x480", "Size of a sample, WIDTHxHEIGHT or one edge.", free=True
    )
    validation_seed: int | None = key(
        None, "Seed of the samples; the run's without it.", free=True, ge=0
    )
    validation_step_interval: int = key(
        0, "Render samples every so many steps; 0: never.", unit="steps", free=True, ge=0
    )
    validation_noise_scheduler: Literal["unipc"] = key("unipc", "Solver of the samples.", free=True)
    disable_benchmark: bool = key(
        False, "Do not render the untrained model before step 1.", free=True
    )
    eval_steps_interval: int = key(
        0, "Measure the held-out loss every so many steps; 0: at the start and the end.",
        unit="steps", free=True, ge=0,
    )  # fmt: skip
    num_eval_images: int = key(
        4, "Samples of each eval dataset that are measured.", free=True, ge=1
    )
    eval_timesteps: int = key(8, "Noise levels at which each is measured.", free=True, ge=1)

    @field_validator("validation_resolution", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("validation_resolution")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parts = value.lower().split("x")
        if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError("write WIDTHxHEIGHT in pixels, such as 832x480")
        return value

    @property
    def validation_size(self) -> tuple[int, int]:
        """(width, height) of a sample in pixels."""
        width, _, height = self.validation_resolution.lower().partition("x")
        return int(width), int(height or width)


class CoreSettings(
    RunKeys, ModelKeys, OptimizerKeys, FlowKeys, DataKeys, ValidationKeys, PluginSettings
):
    """All keys of core."""

    @model_validator(mode="after")
    def _length(self) -> CoreSettings:
        if self.max_train_steps == 0 and self.num_train_epochs == 0:
            raise ValueError(
                "max_train_steps and num_train_epochs are both 0, so the run has no length; "
                "set one of them"
            )
        return self

    @property
    def length(self) -> tuple[int | None, int | None]:
        """(steps, epochs) that bound the run, None where one does not.

        A length that the user did not set does not bound a run whose other length was set.
        """
        steps = self.max_train_steps or None
        epochs = self.num_train_epochs or None
        if steps and (self.ignore_final_epochs or "num_train_epochs" not in self.model_fields_set):
            epochs = None
        return steps, epochs
