"""What plugins may answer: an answer of another kind is refused, naming plugin and hook."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from trainer_core.errors import PluginError
from trainer_core.types import (
    Artifact,
    Encoder,
    Exported,
    ModelSpec,
    ParameterGroup,
    Residency,
    Route,
)

Fits = Callable[[Any, str], bool]
"""Whether an answer fits; the second argument is the plugin's name."""


def checked(plugin: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with its answers checked; as it is for hooks whose answer core looks at."""
    if hook not in _WANTED:
        return function
    fits, wanted = _WANTED[hook]

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        answer = function(*arguments)
        if answer is not None and not fits(answer, plugin):
            refuse(plugin, hook, answer, f"{wanted} or None")
        return answer

    return call


def refuse(plugin: str, where: str, answer: object, wanted: str) -> None:
    """Raise PluginError: what the plugin answered, and what it must answer."""
    kind = type(answer).__name__
    if isinstance(answer, (list, tuple)) and answer:
        kind += f" of {', '.join(sorted({type(item).__name__ for item in answer}))}"
    raise PluginError(
        f"plugin {plugin!r} returned {'None' if answer is None else kind} from {where}; it must "
        f"return {wanted}. Leave {plugin} out of --plugins, or tell its author."
    )


def encoders_of(plugin: str, answer: Any) -> Sequence[Encoder]:
    """Return what a plugin's ``encoders()`` answered, if it is that."""
    if not _all_are(answer, Encoder):
        refuse(plugin, "encoders", answer, "a list of Encoder")
    return list(answer)


def groups_of(plugin: str, answer: Any) -> Sequence[ParameterGroup]:
    """Return what a plugin's ``parameters()`` answered, if it is that."""
    from torch import nn

    if not _all_are(answer, ParameterGroup):
        refuse(plugin, "parameters", answer, "a list of ParameterGroup")
    groups: list[ParameterGroup] = list(answer)
    for group in groups:
        if not all(isinstance(parameter, nn.Parameter) for _, parameter in group.parameters):
            refuse(plugin, "parameters", [p for _, p in group.parameters], "nn.Parameter in it")
    return groups


def state_of(plugin: str, answer: Any) -> Mapping[str, Any]:
    """Return what a plugin's ``state_dict()`` answered, if a checkpoint can hold it."""
    import json

    from torch import Tensor

    wanted = "names with tensors and JSON-able values"
    if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
        refuse(plugin, "state_dict", answer, wanted)
    for name, value in answer.items():
        try:
            json.dumps(None if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RecursionError):
            refuse(plugin, f"state_dict, {name!r}", value, wanted)
    state: Mapping[str, Any] = answer
    return state


def _all_are(answer: object, kind: type) -> bool:
    return isinstance(answer, (list, tuple)) and all(isinstance(item, kind) for item in answer)


def _is_model(answer: object, plugin: str) -> bool:
    from trainer_core.capabilities import Model

    return isinstance(answer, Model)


def _is_optimizer(answer: object, plugin: str) -> bool:
    from torch.optim import Optimizer

    return isinstance(answer, Optimizer)


def _is_encoded(answer: object, plugin: str) -> bool:
    from torch import Tensor

    return isinstance(answer, (list, tuple)) and all(
        isinstance(item, Mapping) and all(isinstance(value, Tensor) for value in item.values())
        for item in answer
    )


def _are_routes(answer: object, plugin: str) -> bool:
    routes = answer if isinstance(answer, (list, tuple)) else [answer]
    return all(isinstance(route, Route) and route.plugin == plugin for route in routes)


def _are_artifacts(answer: object, plugin: str) -> bool:
    if not _all_are(answer, Artifact):
        return False
    artifacts: Sequence[Artifact] = answer  # type: ignore[assignment]  # just checked
    return all(_is_clip(a.frames) and is_file_name(a.name) and a.fps > 0 for a in artifacts)


def _is_clip(frames: Any) -> bool:
    shape: tuple[int, ...] = getattr(frames, "shape", ())
    fits = len(shape) == 4 and shape[-1] == 3 and min(shape) > 0
    return fits and str(getattr(frames, "dtype", "")) == "uint8"


def is_file_name(name: object) -> bool:
    """Return whether a name stays in the folder that it is put in, on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "replace")) <= 200
        and name.isprintable()
        and name not in (".", "..")
        and not set('/\\:*?"<>|') & set(name)
    )


_WANTED: Mapping[str, tuple[Fits, str]] = {
    "describe_model": (lambda a, _: isinstance(a, ModelSpec), "a ModelSpec"),
    "encode_batch": (_is_encoded, "a list with one mapping of names to tensors for each sample"),
    "load_model": (
        _is_model,
        "a Model (spec, modules, networks and predict; see trainer_core.capabilities)",
    ),
    "route_tokens": (_are_routes, "a Route, or a list of them, with the plugin's own name in it"),
    "offload": (
        lambda a, _: (
            isinstance(a, (Residency, AbstractContextManager))
            or (bool(a) and _all_are(a, Residency))
        ),
        "a Residency or one for each role at set-up, a context manager in a phase",
    ),
    "build_optimizer": (_is_optimizer, "a torch optimiser"),
    "save_weights": (lambda a, _: _all_are(a, str), "a list of file names"),
    "export_weights": (lambda a, _: isinstance(a, Exported), "an Exported"),
    "load_weights": (lambda a, _: isinstance(a, bool), "True or False"),
    "validate": (
        _are_artifacts,
        "a list of Artifact: frames (F, H, W, 3) uint8, a rate above 0, a name without / or \\",
    ),
}
