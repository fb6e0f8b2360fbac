"""Which layers get which form of adapter.

Knows nothing of the trainer. The most telling wins: a name's own form before a class's, an inner class
before the one around it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from trainer_lycoris.options import Form, Options, OptionsError, Preset

if TYPE_CHECKING:
    from torch import nn

MOST_NAMES = 12


def choose(module: nn.Module, options: Options) -> dict[str, Form]:
    """Return layer → form of every linear layer that is adapted, in the order of the module.

    OptionsError for a class or a pattern that stands for nothing, with what there is.
    """
    preset = options.preset
    classes = _classes(module, preset)
    used: set[str] = set()
    found: dict[str, Form] = {}
    for name, around in _linear(module):
        if _matching(preset, preset.exclude_name, name, used):
            continue
        form = _form(preset, classes, around, name, used)
        if form is not None:
            found[name] = form.over(options.form)
    _check_used(module, preset, used)
    if not found:
        raise OptionsError(["apply_preset leaves no linear layer; name others."])
    return found


def _form(
    preset: Preset,
    classes: dict[str, str],
    around: Sequence[str],
    name: str,
    used: set[str],
) -> Form | None:
    """Return the form of a layer, an empty one for that of all, None for a layer that is left out."""
    names = _matching(preset, preset.name_algo_map, name, used)
    inner = [classes[kind] for kind in reversed(around) if kind in classes]
    used.update(inner)
    chosen = _matching(preset, preset.target_name, name, used)
    if names:
        return preset.name_algo_map[names[0]]
    for kind in inner:
        if kind in preset.module_algo_map:
            return preset.module_algo_map[kind]
    everything = not (preset.target_module or preset.target_name or preset.module_algo_map
                      or preset.name_algo_map)  # fmt: skip
    return Form() if inner or chosen or everything else None


def _linear(module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, classes around it from the outside in, its own last) of each linear layer."""
    from torch import nn

    kinds = {name: type(child).__name__ for name, child in module.named_modules()}
    for name, child in module.named_modules():
        if name and isinstance(child, nn.Linear):
            parts = name.split(".")
            around = [kinds[".".join(parts[:n])] for n in range(len(parts) + 1)]
            yield name, around


def _classes(module: nn.Module, preset: Preset) -> dict[str, str]:
    """Return class of the model → what the preset calls it.

    A name that no class has stands for those that end with it: Attention for WanAttention.
    """
    kinds = sorted({type(child).__name__ for child in module.modules()})
    found = {}
    for word in dict.fromkeys([*preset.module_algo_map, *preset.target_module]):
        fitting = [word] if word in kinds else [kind for kind in kinds if kind.endswith(word)]
        for kind in fitting:
            found.setdefault(kind, word)
    return found


def _matching(
    preset: Preset, patterns: Sequence[str] | dict[str, Form], name: str, used: set[str]
) -> list[str]:
    found = [p for p in patterns if p == name or _fits(preset, p, name)]
    used.update(found)
    return sorted(found, key=lambda p: (p != name, -len(p)))


def _fits(preset: Preset, pattern: str, name: str) -> bool:
    if preset.use_fnmatch:
        return fnmatch.fnmatch(name, pattern)
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        text = f"apply_preset: {pattern!r} is no regular expression ({error}); correct it."
        raise OptionsError([text]) from None


def _check_used(module: nn.Module, preset: Preset, used: set[str]) -> None:
    wrong = []
    classes = sorted({type(child).__name__ for child in module.modules()} - {"Linear"})
    for word in dict.fromkeys([*preset.target_module, *preset.module_algo_map]):
        if word not in used:
            near = get_close_matches(word, classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(classes)}."
            wrong.append(f"apply_preset: no class with linear layers is called {word!r}; {hint}")
    names = [name for name, _ in _linear(module)]
    for word in dict.fromkeys([*preset.target_name, *preset.name_algo_map, *preset.exclude_name]):
        if word not in used:
            shown = ", ".join(names[:MOST_NAMES])
            wrong.append(f"apply_preset: {word!r} matches no linear layer; layers are {shown}.")
    if wrong:
        raise OptionsError(wrong)
