"""Random numbers as a pure function of (seed, purpose, step, micro step, rank, ...).

Nothing of ours draws from a global generator, so that switching a plugin off leaves every other
draw bit-identical, and a resumed run needs no saved generator state. Layers that know nothing else
(dropout) do draw from torch's: the loop seeds it anew for every micro-step.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, purpose: str, *parts: int | str) -> int:
    """Return 63 bits that depend on every argument: BLAKE2b over their unambiguous encoding."""
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(
    seed: int, purpose: str, *parts: int | str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a fresh generator on ``device`` seeded by :func:`seed_of`."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_of(seed, purpose, *parts))


def seed_global(seed: int, *parts: int | str, device: torch.device) -> None:
    """Seed torch's global generators, which dropout draws from, by :func:`seed_of`.

    Those of the CPU and of ``device``; ``torch.manual_seed`` gives them the same state, but looks for
    every other device too and keeps a stack trace for each, which takes longer than a whole step here.
    """
    import torch

    value = seed_of(seed, "global", *parts)
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
    elif device.type == "cuda":
        torch.default_generator.manual_seed(value)
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
    else:
        torch.manual_seed(value)
