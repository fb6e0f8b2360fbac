"""The plugin's keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from trainer_core.errors import ConfigError, Problem
from trainer_core.settings.keys import PluginSettings, key

CHUNK_VARIABLE = "WAN_FEED_FORWARD_CHUNK_SIZE"
LEAST_CHUNK = 256
DEFAULT_CHUNK = 4096

Mechanism = Literal[
    "diffusers",
    "sageattention",
    "flash-attn-2",
    "flash-attn-3",
    "xformers",
    "flex",
    "native-cudnn",
    "native-efficient",
    "native-flash",
    "native-math",
]


class WanSettings(PluginSettings):
    """How blocks are computed; flavour, weights and precision are core's keys."""

    attention_mechanism: Mechanism = key(
        "diffusers",
        "Kernel of attention; diffusers is PyTorch's own choice. sageattention, which has no backward, "
        "draws the samples only.",
        free=True,
    )
    enable_chunked_feed_forward: bool = key(
        False,
        "Compute feed-forward layers in chunks of tokens, each again in the backward: the same result, "
        "less memory at once.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    feed_forward_chunk_size: int | None = key(
        None,
        f"Tokens of a chunk, {DEFAULT_CHUNK} without it, {LEAST_CHUNK} at the least; the environment's "
        f"{CHUNK_VARIABLE} sets it too and switches chunks on.",
        unit="tokens",
        menu="Training → Memory Optimisation",
        free=True,
        ge=1,
    )

    @model_validator(mode="after")
    def _chunks(self) -> WanSettings:
        if self.feed_forward_chunk_size is not None and not self.enable_chunked_feed_forward:
            raise ValueError(
                "feed_forward_chunk_size acts with enable_chunked_feed_forward only; set that too, or "
                "remove it"
            )
        return self


def chunk_of(
    settings: WanSettings, environ: Mapping[str, str] = os.environ
) -> tuple[int, str | None]:
    """Return the tokens of a chunk, 0 for no chunks, and a sentence where it is not what was asked.

    The environment's variable wins, for a quick experiment. Raises ConfigError where it is no number.
    """
    asked, name = settings.feed_forward_chunk_size, "feed_forward_chunk_size"
    if text := environ.get(CHUNK_VARIABLE, "").strip():
        if not text.isdecimal() or int(text) < 1:
            problem = Problem(
                CHUNK_VARIABLE,
                "must be a whole number of tokens, at least 1.",
                value=text,
                where="environment",
            )
            raise ConfigError([problem])
        asked, name = int(text), CHUNK_VARIABLE
    elif not settings.enable_chunked_feed_forward:
        return 0, None
    if asked is None:
        return DEFAULT_CHUNK, None
    if asked < LEAST_CHUNK:
        return LEAST_CHUNK, (
            f"{name} = {asked} counts tokens; chunks of {LEAST_CHUNK} are taken, since smaller ones cost "
            "more time than they save memory"
        )
    return asked, None
