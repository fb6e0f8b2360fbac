"""``memory_policy: auto``: the fastest way of training that fits, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer_core import session
from trainer_core.blame import blame
from trainer_core.errors import TrainerError
from trainer_core.faults import told
from trainer_core.planner.fit import GIB, needed
from trainer_core.planner.rehearse import TRAINING, Forecast, forecast
from trainer_core.progress import Display
from trainer_core.settings.load import located

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.settings.load import Resolved

Prepare = Callable[[Mapping[str, Any]], "tuple[Resolved, Host]"]
"""Overrides of keys → the settings and plugins with them."""
MARGIN = 0.05
"""Share of the memory that is left free, for what a rehearsal does not see."""
FULL: Mapping[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_policy": "full",
}
OFFLOAD: Mapping[str, Any] = {
    **FULL,
    "enable_group_offload": True,
    "group_offload_use_stream": True,
}


@dataclass(frozen=True)
class Way:
    """Settings that change no result, and what they do, in a sentence."""

    keys: Mapping[str, Any]
    about: str


WAYS: tuple[Way, ...] = (
    Way({"gradient_checkpointing": False}, "nothing is computed twice"),
    Way({**FULL, "gradient_checkpointing_policy": "ffn"}, "feed-forwards are computed twice"),
    Way(
        {**FULL, "gradient_checkpointing_policy": "keep_attention"},
        "all but self-attention is computed twice",
    ),
    Way(FULL, "blocks are computed twice"),
    Way(OFFLOAD, "blocks are computed twice and come from host memory"),
    Way(
        {**OFFLOAD, "enable_chunked_feed_forward": True},
        "blocks are computed twice, in chunks, and come from host memory",
    ),
)
"""Fastest first. What would change a result (8-bit weights, a smaller batch) is never chosen."""


def memory_of(device: torch.device) -> float:
    """Return the bytes of a card, or of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def settle(
    prepare: Prepare, *, capacity: float | None = None, ways: Sequence[Way] = WAYS
) -> tuple[Mapping[str, Any], str]:
    """Return the keys of the first way that fits, the last one if none does, and a sentence.

    capacity: bytes, those of the device without it. Ways that the settings refuse (a plugin is not
    installed, the device cannot do it) are passed over.
    """
    known: Forecast | None = None
    chosen: tuple[Way, float] | None = None
    room = 0.0
    for way in ways:
        try:
            resolved, host = prepare(way.keys)
            with told(), blame(host), located(resolved):
                begun = session.prepare(resolved, host, display=Display.silent())
                if "enable_group_offload" in way.keys and begun.run.device.type != "cuda":
                    continue
                room = (capacity or memory_of(begun.run.device)) * (1 - MARGIN)
                known = forecast(begun.run, host, known=known)
        except TrainerError:
            if way is ways[0]:
                raise  # the settings themselves are wrong: say so now
            continue
        training = [phase for phase in known.phases if phase.name == TRAINING]
        chosen = way, needed(known, training)
        if chosen[1] <= room:
            break
    assert chosen is not None  # the first way is refused by an error only
    way, need = chosen
    fits = "needs" if need <= room else "is the least and needs"
    values = ", ".join(f"{key} {str(value).lower()}" for key, value in way.keys.items())
    sentence = (
        f"memory_policy auto: {values} ({way.about}); training {fits} {need / GIB:.2f} of "
        f"{room / GIB:.2f} GiB"
    )
    assert known is not None  # a way was chosen
    if known.peak.name != TRAINING and (most := needed(known)) > room:
        sentence += (
            f". {known.peak.name} needs {most / GIB:.2f} GiB, which this does not change: "
            "trainer plan --vram tells what does"
        )
    return way.keys, sentence
