"""Phases of a run, which plugins surround to move weights and states between memories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import combinations
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


def residency(host: Host, run: Run) -> Mapping[str | None, Residency]:
    """Return role → who moves the weights of its blocks; None stands for every other role.

    Checks that each module has one owner, and that one plugin moves the blocks of a run.
    """
    found: list[Residency] = []
    for answer in host.hooks.offload(run=run, phase=None):  # HOOK collected
        for item in answer if isinstance(answer, Sequence) else [answer]:
            if not isinstance(item, Residency):
                raise PluginError(
                    f"a plugin answered offload(phase=None) with {type(item).__name__}; "
                    "at set-up it must be a Residency or None"
                )
            found.append(item)
    for first, second in combinations(found, 2):
        shared = sorted(set(first.modules) & set(second.modules))
        if shared:
            raise PluginError(
                f"plugins {first.plugin} and {second.plugin} both want to move {shared[0]}; "
                "leave one of them out"
            )
        if first.plugin != second.plugin or first.role == second.role:
            raise PluginError(
                f"plugins {first.plugin} and {second.plugin} both move blocks; one run takes one of "
                "them"
            )
    return {item.role: item for item in found}
