"""Whether a forecast fits a card, and what would make it fit: cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer_core.planner.rehearse import ENCODING, SAMPLES, TRAINING, Forecast, Phase

GIB = 2**30
CONTEXT = 0.7 * GIB
"""What a CUDA process holds before the first tensor: context, kernels, workspaces of the libraries."""
SHARE_LOST = 0.04
"""Of the tensors' bytes: gaps that the allocator cannot fill."""


@dataclass(frozen=True)
class Remedy:
    """Settings that need less.

    about: what it costs. phases: beginnings of the phases that it helps. instead: switches that cannot
    stand beside it, and are not needed then.
    """

    keys: Mapping[str, Any]
    about: str
    phases: tuple[str, ...] = (TRAINING,)
    instead: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{key} {_shown(value)}" for key, value in self.keys.items())


REMEDIES: tuple[Remedy, ...] = (
    Remedy({"vae_batch_size": 1}, "caching is a little slower", (ENCODING,)),
    Remedy(
        {"text_encoder_1_precision": "int8-torchao"},
        "captions are encoded from 8-bit weights",
        (ENCODING,),
    ),
    Remedy(
        {"vae_enable_tiling": True},
        "large clips are encoded and decoded in blended tiles",
        (ENCODING, SAMPLES),
    ),
    Remedy(
        {"enable_model_cpu_offload": True},
        "the model waits in host memory while samples are decoded",
        (SAMPLES,),
    ),
    Remedy(
        {"wan_one_expert_resident": True},
        "of two experts one waits in host memory",
        (TRAINING, SAMPLES),
    ),
    Remedy(
        {"gradient_checkpointing": True, "gradient_checkpointing_policy": "ffn"},
        "feed-forwards are computed twice",
    ),
    Remedy(
        {"gradient_checkpointing": True, "gradient_checkpointing_policy": "keep_attention"},
        "all but self-attention is computed twice",
    ),
    Remedy(
        {"gradient_checkpointing": True, "gradient_checkpointing_policy": "full"},
        "blocks are computed twice",
    ),
    Remedy(
        {"enable_group_offload": True, "group_offload_use_stream": True},
        "frozen blocks come from host memory; free where a block computes longer than it travels",
        (TRAINING, SAMPLES),
        instead=("enable_model_cpu_offload", "wan_one_expert_resident"),
    ),
    Remedy(
        {"enable_chunked_feed_forward": True},
        "feed-forwards in chunks, computed twice",
        (TRAINING, SAMPLES),
    ),
    Remedy(
        {"base_model_precision": "int8-torchao"},
        "frozen weights are rounded to 8 bits",
        (TRAINING, SAMPLES),
    ),
    Remedy(
        {"train_batch_size": 1}, "fewer clips a step; gradient_accumulation_steps makes up for it"
    ),
)
"""In the order in which they are tried: what costs least first."""


@dataclass(frozen=True)
class Rung:
    """A remedy on top of the ones before, and what the run would need with all of them."""

    remedy: Remedy
    forecast: Forecast


def needed(forecast: Forecast, phases: Sequence[Phase] | None = None) -> float:
    """Return the bytes that a card must have for the worst phase, of all or of some."""
    worst = max(phase.num_bytes for phase in phases or forecast.phases)
    return worst * (1 + SHARE_LOST) + CONTEXT


def ladder(
    begin: Forecast,
    *,
    capacity: float,
    current: Callable[[str], Any],
    forecast: Callable[[Mapping[str, Any], bool], Forecast | None],
    remedies: Sequence[Remedy] = REMEDIES,
) -> Iterator[Rung]:
    """Yield the remedies that help, each on top of the ones before, until the run fits.

    capacity: bytes. current: a key → its value in the run. forecast: overrides, and whether they
    touch encoders → what the run would need, None where they are refused (a plugin that is not
    installed). Those that change nothing, or do not help the phase that needs most, are passed over, and
    tried again once another phase needs most.
    """
    keys: dict[str, Any] = {}
    at, left = begin, list(remedies)
    no_help: set[tuple[int, str]] = set()  # what was tried for a phase
    encoding = False
    while needed(at) > capacity:
        for remedy in left:
            known = (id(remedy), at.peak.name)
            applies = at.peak.name.startswith(remedy.phases) and known not in no_help
            if not applies or all(current(key) == value for key, value in remedy.keys.items()):
                continue
            off = {k: False for k in remedy.instead if keys.get(k, current(k))}
            whole = replace(remedy, keys={**remedy.keys, **off})
            touches = encoding or ENCODING in remedy.phases
            tried = forecast({**keys, **whole.keys}, touches)
            if tried is not None and needed(tried) < needed(at):
                break
            no_help.add(known)
        else:
            return
        left.remove(remedy)
        encoding = touches
        keys |= whole.keys
        at = tried
        yield Rung(whole, at)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
