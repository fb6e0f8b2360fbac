"""Phases of a run, which plugins surround to move weights and states between memories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from trainer_core.errors import PluginError
from trainer_core.types import Phase, Residency

if TYPE_CHECKING:
    from trainer_core.plugins import Host
    from trainer_core.run import Run


@contextmanager
def phase(host: Host, run: Run, name: Phase) -> Iterator[None]:
    """Enter every plugin's context for a phase, as an onion."""
    with ExitStack() as onion:
        for context in host.hooks.offload(run=run, phase=name):  # HOOK collected
            if not isinstance(context, AbstractContextManager):
                raise PluginError(
                    f"a plugin answered offload(phase={name!r}) with {type(context).__name__}; "
                    "in a phase it must be a context manager or None"
                )
            onion.enter_context(context)
        yield


def residency(host: Host, run: Run) -> Residency | None:
    """Return who moves the weights of the blocks, after checking that each module has one owner."""
    found: list[Residency] = []
    for item in host.hooks.offload(run=run, phase=None):  # HOOK collected
        if not isinstance(item, Residency):
            raise PluginError(
                f"a plugin answered offload(phase=None) with {type(item).__name__}; "
                "at set-up it must be a Residency or None"
            )
        found.append(item)
    for index, first in enumerate(found):
        for second in found[index + 1 :]:
            shared = sorted(set(first.modules) & set(second.modules))
            if shared:
                raise PluginError(
                    f"plugins {first.plugin} and {second.plugin} both want to move {shared[0]}; "
                    "leave one of them out"
                )
    if len(found) > 1:
        names = " and ".join(item.plugin for item in found)
        raise PluginError(f"plugins {names} both move blocks; one run takes one of them")
    return found[0] if found else None
