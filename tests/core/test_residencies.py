"""Who moves the blocks of which role."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer_core.errors import PluginError
from trainer_core.phases import residency
from trainer_core.types import Residency


def made(plugin: str, role: str | None, *modules: str) -> Residency:
    return Residency(plugin, modules or (f"{role}.blocks",), print, print, role=role)


def found(*answers: Any) -> Any:
    hooks = SimpleNamespace(offload=lambda run, phase: list(answers))
    return residency(SimpleNamespace(hooks=hooks), SimpleNamespace())  # type: ignore[arg-type]


def test_a_plugin_may_move_the_blocks_of_each_role_by_itself():
    high, low = made("mover", "transformer"), made("mover", "transformer_2")
    assert found([high, low]) == {"transformer": high, "transformer_2": low}


def test_one_residency_stands_for_every_role():
    every = made("mover", None)
    assert found(every) == {None: every}


def test_nobody_is_fine():
    assert found() == {}


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([made("a", "x"), made("b", "x")], "plugins a and b both want to move x.blocks"),
        ([made("a", "x"), made("b", "y")], "plugins a and b both move blocks"),
        ([[made("a", "x", "one"), made("a", "x", "two")]], "plugins a and a both move blocks"),
        ([[made("a", "x"), 3]], "int; at set-up it must be a Residency or None"),
    ],
)
def test_two_owners_and_other_answers_are_refused(answers: list[Any], text: str):
    with pytest.raises(PluginError, match=text):
        found(*answers)
