"""The members of the family: repositories, shapes, and whether weights are what a flavour says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from trainer_core.errors import ConfigError, Problem
from trainer_core.types import Expert, ModelSpec

DEFAULT = "t2v-480p-1.3b-2.1"
HIGH, LOW = "transformer", "transformer_2"
"""The high- and the low-noise expert, by diffusers' names of the components."""

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
    model it trains, None where there is one. boundary: share of the noise range where the low-noise
    expert ends, as the repository's own pipeline has it.
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
    boundary: float | None = None

    @property
    def uses_clip(self) -> bool:
        """Whether the model looks at the image through CLIP too."""
        return self.shape.image_dim is not None

    @property
    def given_frames(self) -> tuple[str, ...]:
        """Frames of a clip that the model is given: none, the first, or the first and the last."""
        return {"i2v": ("first",), "flf2v": ("first", "last")}.get(self.task, ())

    @property
    def roles(self) -> tuple[str, ...]:
        """Components that are trained, in diffusers' names: the high-noise expert comes first."""
        return {"low": (LOW,), "both": (HIGH, LOW)}.get(self.stage or "", (HIGH,))

    def spec(
        self, *, model_type: str, boundary: float | None = None, num_blocks: int | None = None
    ) -> ModelSpec:
        """Return the facts that core asks for.

        boundary: the weights' own boundary_ratio; the repository's without it. num_blocks: of the
        weights, where they are known.
        """
        what = "LoRA" if model_type == "lora" else "all weights"
        experts = experts_of(self, self.boundary if boundary is None else boundary)
        return ModelSpec(
            name=self.name,
            fps=self.fps,
            frame_stride=4,
            alignment=self.alignment,
            patch=(4, self.alignment, self.alignment),
            experts=experts,
            sizes=self.sizes,
            sentence=f"{self.title}, {_ranges(self, experts)}, {what}",
            num_blocks=num_blocks,
            needs={"image_embeds": "the plugin clip"} if self.uses_clip else {},
        )


def experts_of(flavour: Flavour, boundary: float | None) -> tuple[Expert, ...]:
    """Return the trained experts with their shares of the noise range.

    As diffusers' pipelines do it: ``transformer`` denoises from the boundary on, ``transformer_2``
    below it.
    """
    if flavour.stage is None or boundary is None:
        return tuple(Expert(role) for role in flavour.roles)
    ranges = {HIGH: (boundary, 1.0), LOW: (0.0, boundary)}
    return tuple(Expert(role, *ranges[role]) for role in flavour.roles)


def _ranges(flavour: Flavour, experts: tuple[Expert, ...]) -> str:
    if flavour.stage is None:
        return "all noise levels"
    names = {HIGH: "high-noise expert", LOW: "low-noise expert"}
    return " and ".join(
        f"{names[e.role]}, t in [{1000 * e.sigma_min:g}, {1000 * e.sigma_max:g}]" for e in experts
    )


def _a14b(task: Literal["t2v", "i2v"], shape: Shape, boundary: float) -> list[Flavour]:
    repo, title = f"Wan-AI/Wan2.2-{task.upper()}-A14B-Diffusers", f"Wan 2.2 {task.upper()} A14B"
    stages: tuple[Literal["high", "low", "both"], ...] = ("high", "low", "both")
    return [
        Flavour(
            f"{task}-14b-2.2-{stage}", title, repo, shape, task=task, stage=stage, boundary=boundary
        )
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
        ),
        Flavour(
            "t2v-480p-14b-2.1",
            "Wan 2.1 T2V 14B",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            WAN_14B,
        ),
        Flavour(
            "i2v-14b-2.1",
            "Wan 2.1 I2V 14B 480p",
            i2v.format("480P"),
            WAN_14B_I2V_CLIP,
            task="i2v",
            sizes=SIZES_480P,
        ),
        Flavour(
            "i2v-14b-2.1-720p",
            "Wan 2.1 I2V 14B 720p",
            i2v.format("720P"),
            WAN_14B_I2V_CLIP,
            task="i2v",
            sizes=SIZES_720P,
        ),
        Flavour(
            "flf2v-14b-2.1",
            "Wan 2.1 FLF2V 14B",
            "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            WAN_14B_FLF2V,
            task="flf2v",
            sizes=SIZES_720P,
        ),
        *_a14b("i2v", WAN_14B_I2V, 0.9),
        *_a14b("t2v", WAN_14B, 0.875),
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

    Raises ConfigError for an unknown name.
    """
    name = name or DEFAULT
    flavour = FLAVOURS.get(name)
    if flavour is None:
        near = difflib.get_close_matches(name, FLAVOURS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        text = f"wan has no such flavour. {hint}"
        raise refused(name, text, f"It trains {', '.join(FLAVOURS)}.")
    return flavour


def refused(name: str, text: str, way_out: str) -> ConfigError:
    """Return the error that a model_flavour gets."""
    return ConfigError([Problem("model_flavour", text.strip(), value=name, way_out=way_out)])
