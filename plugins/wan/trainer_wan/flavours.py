"""The members of the family: repositories, shapes, and whether weights are what a flavour says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from trainer_core.errors import ConfigError, Problem
from trainer_core.types import Expert, ModelSpec

DEFAULT = "t2v-480p-1.3b-2.1"

Size = tuple[int, int]
SIZES_480P: tuple[Size, ...] = ((832, 480), (480, 832))
SIZES_720P: tuple[Size, ...] = ((1280, 720), (720, 1280))


@dataclass(frozen=True)
class Shape:
    """What tells the transformers of the family apart; the names are those of their config.json."""

    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Return the shape that a config.json tells; unset keys as diffusers reads them."""
        preset = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
        preset |= {"num_layers": 40, "in_channels": 16}
        values = {f.name: config.get(f.name, preset.get(f.name)) for f in fields(cls)}
        values["out_channels"] = values["out_channels"] or values["in_channels"]
        return cls(**values)


WAN_1_3B = Shape(12, 128, 8960, 30, 16, 16)
WAN_14B = Shape(40, 128, 13824, 40, 16, 16)
WAN_14B_I2V_CLIP = Shape(40, 128, 13824, 40, 36, 16, image_dim=1280)
WAN_14B_FLF2V = Shape(40, 128, 13824, 40, 36, 16, image_dim=1280, pos_embed_seq_len=514)
WAN_14B_I2V = Shape(40, 128, 13824, 40, 36, 16)
WAN_5B = Shape(24, 128, 14336, 30, 48, 48)


@dataclass(frozen=True)
class Flavour:
    """A member of the family.

    title: for sentences. task: what goes in beside the text. stage: which expert of a two-expert
    model it trains, None where there is one. built: this version can train it.
    """

    name: str
    title: str
    repo: str
    shape: Shape
    task: Literal["t2v", "i2v", "flf2v", "ti2v"] = "t2v"
    stage: Literal["high", "low", "both"] | None = None
    sizes: tuple[Size, ...] = SIZES_480P + SIZES_720P
    fps: float = 16.0
    alignment: int = 16
    built: bool = False

    def spec(self, *, model_type: str, num_blocks: int | None = None) -> ModelSpec:
        """Return the facts that core asks for; one expert over the whole noise range.

        num_blocks: of the weights, where they are known.
        """
        what = "LoRA" if model_type == "lora" else "all weights"
        return ModelSpec(
            name=self.name,
            fps=self.fps,
            frame_stride=4,
            alignment=self.alignment,
            patch=(4, self.alignment, self.alignment),
            experts=(Expert("transformer"),),
            sizes=self.sizes,
            sentence=f"{self.title}, all noise levels, {what}",
            num_blocks=num_blocks,
        )


def _a14b(task: Literal["t2v", "i2v"], shape: Shape) -> list[Flavour]:
    repo, title = f"Wan-AI/Wan2.2-{task.upper()}-A14B-Diffusers", f"Wan 2.2 {task.upper()} A14B"
    stages: tuple[Literal["high", "low", "both"], ...] = ("high", "low", "both")
    return [
        Flavour(f"{task}-14b-2.2-{stage}", f"{title} {stage}", repo, shape, task=task, stage=stage)
        for stage in stages
    ]


def _family() -> dict[str, Flavour]:
    i2v = "Wan-AI/Wan2.1-I2V-14B-{}-Diffusers"
    members = [
        Flavour(
            DEFAULT,
            "Wan 2.1 T2V 1.3B",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            WAN_1_3B,
            sizes=SIZES_480P,
            built=True,
        ),
        Flavour(
            "t2v-480p-14b-2.1",
            "Wan 2.1 T2V 14B",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            WAN_14B,
            built=True,
        ),
        Flavour(
            "i2v-14b-2.1", "Wan 2.1 I2V 14B 480p", i2v.format("480P"), WAN_14B_I2V_CLIP, task="i2v"
        ),
        Flavour(
            "i2v-14b-2.1-720p",
            "Wan 2.1 I2V 14B 720p",
            i2v.format("720P"),
            WAN_14B_I2V_CLIP,
            task="i2v",
        ),
        Flavour(
            "flf2v-14b-2.1",
            "Wan 2.1 FLF2V 14B",
            "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            WAN_14B_FLF2V,
            task="flf2v",
        ),
        *_a14b("i2v", WAN_14B_I2V),
        *_a14b("t2v", WAN_14B),
        Flavour(
            "ti2v-5b-2.2",
            "Wan 2.2 TI2V 5B",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            WAN_5B,
            task="ti2v",
            sizes=((1280, 704), (704, 1280)),
            fps=24.0,
            alignment=32,
        ),
    ]
    return {flavour.name: flavour for flavour in members}


FLAVOURS: Mapping[str, Flavour] = _family()


def choose(name: str | None) -> Flavour:
    """Return the flavour of that name, the default for None.

    Raises ConfigError for an unknown name and for one that this version cannot train.
    """
    name = name or DEFAULT
    flavour = FLAVOURS.get(name)
    built = ", ".join(f.name for f in FLAVOURS.values() if f.built)
    if flavour is None:
        near = difflib.get_close_matches(name, FLAVOURS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise _refused(name, f"wan has no such flavour. {hint}", f"It trains {built}.")
    if not flavour.built:
        raise _refused(name, f"{flavour.title} is not built yet.", f"Take one of {built}.")
    return flavour


def check_repo(flavour: Flavour, repo: str) -> bool:
    """Return whether ``repo`` is known to fit; ConfigError if it is known not to. No network."""
    known = [other for other in FLAVOURS.values() if other.repo == repo]
    if known and flavour not in known:
        raise _contradiction(flavour, repo, known)
    return bool(known)


def check_weights(
    flavour: Flavour, *, config: Mapping[str, Any], index: Mapping[str, Any], source: str
) -> None:
    """Raise ConfigError where weights contradict the flavour.

    config: the transformer's config.json; index: the pipeline's model_index.json. A known shape
    must be the flavour's; of an unknown one (a tiny test model) channels, CLIP and experts must
    agree.
    """
    shape = Shape.of(config)
    staged = index.get("boundary_ratio") is not None
    fits = [f for f in FLAVOURS.values() if f.shape == shape and (f.stage is not None) == staged]
    if flavour in fits:
        return
    if fits:
        raise _contradiction(flavour, source, fits)
    wanted = flavour.shape
    differs = {
        "in_channels": (shape.in_channels, wanted.in_channels),
        "out_channels": (shape.out_channels, wanted.out_channels),
        "image_dim": (bool(shape.image_dim), bool(wanted.image_dim)),
        "boundary_ratio": (staged, flavour.stage is not None),
    }
    for name, (found, expected) in differs.items():
        if found != expected:
            given = f"{name} {config.get(name, index.get(name))}"
            raise _refused(
                flavour.name,
                f"the weights of pretrained_model_name_or_path = {source!r} have {given}, "
                f"which no {flavour.title} has.",
                f"Set pretrained_model_name_or_path to {flavour.repo}, or model_flavour to what "
                "the weights are.",
            )


def _contradiction(flavour: Flavour, source: str, fits: list[Flavour]) -> ConfigError:
    names = " or ".join(f.name for f in fits)
    return _refused(
        flavour.name,
        f"pretrained_model_name_or_path = {source!r} holds {fits[0].title}, not {flavour.title}.",
        f"Set model_flavour to {names}, or pretrained_model_name_or_path to {flavour.repo}.",
    )


def _refused(name: str, text: str, way_out: str) -> ConfigError:
    return ConfigError([Problem("model_flavour", text.strip(), value=name, way_out=way_out)])
