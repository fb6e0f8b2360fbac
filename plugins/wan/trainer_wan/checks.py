"""Whether weights and keys are what a flavour says; all told before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.errors import ConfigError, Problem
from trainer_wan.flavours import FLAVOURS, HIGH, LOW, Flavour, Shape, refused
from trainer_wan.weights import BASE, VAE

if TYPE_CHECKING:
    from trainer_wan.config import WanSettings
    from trainer_wan.weights import Weights


def check_repo(flavour: Flavour, repo: str) -> bool:
    """Return whether ``repo`` is known to fit; ConfigError if it is known not to. No network."""
    known = [other for other in FLAVOURS.values() if other.repo == repo]
    if known and flavour not in known:
        raise _contradiction(flavour, repo, known)
    return bool(known)


def check_weights(
    flavour: Flavour,
    *,
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    source: str,
    key: str = BASE,
) -> None:
    """Raise ConfigError where weights contradict the flavour.

    config: the transformer's config.json; index: the pipeline's model_index.json; key: the setting
    that names the transformer's ``source``. A known shape
    must be the flavour's; of an unknown one (a tiny test model) channels, CLIP and experts must
    agree.
    """
    shape = Shape.of(config)
    staged = index.get("boundary_ratio") is not None
    fits = [f for f in FLAVOURS.values() if f.shape == shape and (f.stage is not None) == staged]
    if flavour in fits:
        return
    if fits:
        raise _contradiction(flavour, source, fits, key=key)
    wanted = flavour.shape
    differs = {
        "in_channels": (shape.in_channels, wanted.in_channels),
        "out_channels": (shape.out_channels, wanted.out_channels),
        "image_dim": (bool(shape.image_dim), bool(wanted.image_dim)),
        "pos_embed_seq_len": (shape.pos_embed_seq_len, wanted.pos_embed_seq_len),
        "boundary_ratio": (staged, flavour.stage is not None),
    }
    for name, (found, expected) in differs.items():
        if found != expected:
            given = f"{name} {config.get(name, index.get(name))}"
            raise refused(
                flavour.name,
                f"the weights of {key} = {source!r} have {given}, which no {flavour.title} has.",
                f"Set {key} to {flavour.repo}, or model_flavour to what the weights are.",
            )


def _contradiction(
    flavour: Flavour, source: str, fits: list[Flavour], *, key: str = BASE
) -> ConfigError:
    names = " or ".join(f.name for f in fits)
    return refused(
        flavour.name,
        f"{key} = {source!r} holds {fits[0].title}, not {flavour.title}.",
        f"Set model_flavour to {names}, or {key} to {flavour.repo}.",
    )


def check_vae(flavour: Flavour, config: Mapping[str, Any], weights: Weights) -> None:
    """Raise ConfigError where the VAE makes other latents than the flavour's transformer takes."""
    channels = config.get("z_dim", 16)
    if channels == flavour.shape.out_channels:
        return
    repo = weights.vae_repo
    key, source = (VAE, repo.source) if repo is not None else (BASE, weights.source)
    raise ConfigError(
        [
            Problem(
                key,
                f"its VAE makes latents of {channels} channels (z_dim), {flavour.name} takes "
                f"{flavour.shape.out_channels}.",
                value=source,
                way_out=f"Take the VAE of {flavour.repo}.",
            )
        ]
    )


def check_whole(flavour: Flavour, weights: Weights, *, needed: Sequence[str]) -> None:
    """Raise ConfigError where a pipeline folder lacks an expert that is needed beside the trained one.

    needed: keys and values that ask for both, such as ``model_type = full``, whose result is a whole
    pipeline. Said before a run that would fail at its end.
    """
    if not weights.is_local or not needed or flavour.stage not in ("high", "low"):
        return
    role = LOW if flavour.stage == "high" else HIGH
    if not weights.base.holds(role):
        text = f"holds no {role}/, which {needed[0]} needs beside the trained expert."
        way_out = f"Fetch {flavour.repo} as a whole, or change that key."
        raise ConfigError([Problem(BASE, text, value=weights.source, way_out=way_out)])


def check_rest(settings: WanSettings, *, blocks_move: bool) -> None:
    """Raise ConfigError where an expert should rest whose blocks somebody else moves.

    blocks_move: a plugin of the run moves the blocks of the model between memories, which is known once
    all plugins have checked the run.
    """
    if settings.wan_one_expert_resident and blocks_move:
        text = "has no effect: a plugin of the run moves the blocks one by one."
        key = "wan_one_expert_resident"
        raise ConfigError([Problem(key, text, value=True, way_out="Remove it.")])


def check_keys(flavour: Flavour, settings: WanSettings, *, model_type: str) -> None:
    """Raise ConfigError for keys that would have no effect with the flavour; all at once."""
    problems = []

    def no_effect(key: str, why: str) -> None:
        value = getattr(settings, key)
        text = f"has no effect with model_flavour {flavour.name}: {why}."
        problems.append(Problem(key, text, value=value, way_out="Remove it."))

    if settings.wan_validation_load_other_stage and flavour.stage is None:
        no_effect("wan_validation_load_other_stage", "the model has one expert")
    if settings.wan_validation_load_other_stage and flavour.stage == "both":
        no_effect("wan_validation_load_other_stage", "both experts are loaded as it is")
    if settings.wan_one_expert_resident and model_type == "full":
        no_effect(
            "wan_one_expert_resident", "model_type full trains all weights, which have to stay"
        )
    two = flavour.stage == "both" or settings.wan_validation_load_other_stage
    if settings.wan_one_expert_resident and not two:
        no_effect("wan_one_expert_resident", "one expert is loaded as it is")
    if settings.wan_first_frame_probability and flavour.task != "ti2v":
        no_effect("wan_first_frame_probability", "it is for ti2v-5b-2.2")
    if settings.wan_validation_image and not _begins_from_an_image(flavour, settings):
        no_effect("wan_validation_image", "its samples begin from text alone")
    if settings.wan_validation_last_image and "last" not in flavour.given_frames:
        no_effect("wan_validation_last_image", "its samples end with no given frame")
    for key in ("wan_validation_image", "wan_validation_last_image"):
        path = getattr(settings, key)
        if path is not None and not Path(path).expanduser().is_file():
            way_out = "Name an image, or remove the key."
            problems.append(Problem(key, "there is no such file.", value=path, way_out=way_out))
    own = settings.pretrained_transformer_model_name_or_path
    if settings.pretrained_transformer_subfolder and own is None:
        no_effect(
            "pretrained_transformer_subfolder",
            "pretrained_transformer_model_name_or_path is not set",
        )
    elif settings.pretrained_transformer_subfolder and str(own).endswith(".safetensors"):
        no_effect("pretrained_transformer_subfolder", "the transformer is a single file")
    if problems:
        raise ConfigError(problems)


def _begins_from_an_image(flavour: Flavour, settings: WanSettings) -> bool:
    return bool(flavour.given_frames) or settings.wan_first_frame_probability > 0
