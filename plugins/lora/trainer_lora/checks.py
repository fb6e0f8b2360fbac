"""What a user can get wrong about the adapter's layers, told with the names that would do."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from trainer_core.errors import ConfigError, Problem
from trainer_lora.shape import Shape, endings, inside_blocks, match, stands_for

if TYPE_CHECKING:
    from torch import nn

MOST_NAMES = 12


def check_targets(module: nn.Module, shape: Shape, role: str) -> None:
    """Raise ConfigError where a target names no linear layer of the role's module."""
    found = match(module, shape.targets)
    shown = ", ".join(endings(found.known)[:MOST_NAMES])
    way_out = f"Linear layers are, for example: {shown}."
    problems = []
    for target in found.unknown:
        text = f"no layer of {role} is called {target} or ends with it."
        problems.append(Problem("peft_lora_target_modules", text, target, way_out=way_out))
    for target, name in found.unfit.items():
        kind = type(module.get_submodule(name)).__name__
        text = f"{name} is a {kind}; an adapter fits linear layers only."
        problems.append(Problem("peft_lora_target_modules", text, target, way_out=way_out))
    problems += _patterns(found.layers, shape, role)
    if problems:
        raise ConfigError(problems)


def _patterns(layers: tuple[str, ...], shape: Shape, role: str) -> Iterator[Problem]:
    """Yield a problem for each name of a pattern that stands for no layer with an adapter."""
    patterns = {
        "lora_rank_pattern": shape.ranks,
        "lora_alpha_pattern": shape.alphas,
        "lora_dropout_pattern": shape.dropouts,
    }
    ends = endings(layers)
    for key, pattern in patterns.items():
        for name in pattern:
            if any(stands_for(name, layer) for layer in layers):
                continue
            near = get_close_matches(name, ends, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            shown = ", ".join(ends[:MOST_NAMES])
            text = f"no layer of {role} with an adapter is called so or ends with it."
            yield Problem(key, text, name, way_out=f"{hint}Layers with an adapter are: {shown}.")


def check_comfyui(module: nn.Module, shape: Shape) -> None:
    """Raise ConfigError where a run in ComfyUI's format could not go on bit for bit.

    Loaders look for alpha inside of blocks only; elsewhere the scale would be multiplied into a matrix.
    """
    for layer in match(module, shape.targets).layers:
        form = shape.of(layer)
        if not inside_blocks(layer) and form.alpha != form.rank:
            text = f"cannot hold the alpha of {layer}, which is {form.alpha:g} at rank {form.rank}."
            way_out = (
                f"Give it the alpha {form.rank} (lora_alpha_pattern), or train in diffusers' format "
                "and use trainer export --format comfyui."
            )
            raise ConfigError([Problem("lora_format", text, "comfyui", way_out=way_out)])
