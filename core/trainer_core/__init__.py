"""Public names of the trainer: all that a plugin needs. They are listed in :mod:`trainer_core.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer_core.api import *  # noqa: F403  # the same names, for type checkers


def __getattr__(name: str) -> object:
    """Import the public names when one is first asked for: ``trainer --help`` needs none of them."""
    if name.startswith("_"):
        raise AttributeError(name)
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec(f"{__name__}.{name}") is not None:
        # `from trainer_core import rng` asks here first; importing the names now would be a circle.
        raise AttributeError(name)
    api = import_module("trainer_core.api")
    if name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)
