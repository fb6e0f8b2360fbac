"""The plugin's keys."""

from __future__ import annotations

from trainer_core.settings.keys import PluginSettings, key


class WanSettings(PluginSettings):
    """Weights other than the pipeline's own, and how samples are conditioned."""

    pretrained_transformer_model_name_or_path: str | None = key(
        None,
        "Transformer to train instead of the pipeline's: a hub repository, a folder, or a single "
        ".safetensors file with diffusers' or the original key names.",
        free=True,
        aliases=("pretrained_transformer_name_or_path",),
    )
    pretrained_transformer_subfolder: str | None = key(
        None,
        'Folder of that transformer in its repository; "none": it lies at the top. Without it the '
        "name of the expert that is trained, transformer or transformer_2.",
        free=True,
    )
    pretrained_vae_model_name_or_path: str | None = key(
        None,
        "VAE to use instead of the pipeline's: a hub repository or a folder, with the VAE in vae/ or "
        "at the top.",
        free=True,
    )
    wan_validation_load_other_stage: bool = key(
        False,
        "Let both experts of Wan 2.2 draw the samples, each on its side of the boundary; otherwise "
        "the trained one draws them alone.",
        free=True,
    )
    wan_one_expert_resident: bool = key(
        False,
        "Keep one of two experts at a time on the accelerator, the other in host memory: half the "
        "memory of frozen weights, for a transfer of one expert each way at every change.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    wan_validation_image: str | None = key(
        None,
        "Image that samples of an image-to-video model begin from; without it the first frame of a "
        "held-out clip, or of a clip that is trained on.",
        free=True,
    )
    wan_validation_last_image: str | None = key(
        None,
        "Image that samples of a first-and-last-frame model end with; without it the last frame of "
        "that clip.",
        free=True,
    )
    wan_first_frame_probability: float = key(
        0.0,
        "Share of clips that TI2V 5B is given the first frame of in training: 0 trains "
        "text-to-video, 1 image-to-video.",
        ge=0,
        le=1,
    )
    wan_force_2_1_time_embedding: bool = key(
        False,
        "One timestep for a clip, as in Wan 2.1, where all tokens of it have the same; and a time "
        "embedding that does not fit is taken from pretrained_model_name_or_path.",
    )
