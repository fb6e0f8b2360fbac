"""Errors that a user sees: what is wrong, where it stands, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    ``where`` is the file (or "command line", "environment") that holds the key; ``allowed`` and
    ``way_out`` are sentences without a leading capital so that they can be joined.
    """

    key: str
    text: str
    value: object = None
    where: str = ""
    way_out: str = ""
    has_value: bool = True

    def __str__(self) -> str:
        head = f"{self.where}: {self.key}" if self.where else self.key
        shown = f" = {_short(self.value)}" if self.has_value else ""
        out = f" {self.way_out}" if self.way_out else ""
        return f"{head}{shown}: {self.text}{out}"


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class TrainerError(Exception):
    """Base of every error that is shown to the user without a traceback."""

    exit_code = 1


class ConfigError(TrainerError):
    """The settings, all of their problems at once."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem(key="settings", text=problems, has_value=False)]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PluginError(TrainerError):
    """A plugin is missing, clashes with another one, or broke a rule of the host."""

    exit_code = 2


class DataError(TrainerError):
    """The data cannot be used as the settings ask."""

    exit_code = 2


class ModelError(TrainerError):
    """The weights cannot be used as the settings ask."""

    exit_code = 2


class CheckpointError(TrainerError):
    """A checkpoint is damaged, or belongs to a different run."""

    exit_code = 2
