"""Errors that a user sees: what is wrong, where it stands, and the way out."""

from __future__ import annotations

import re
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
        key = self.key if self.key.strip() and len(self.key) <= 200 else _short(self.key)
        head = f"{self.where}: {key}" if self.where else key
        shown = f" = {_short(self.value)}" if self.has_value else ""
        out = f" {self.way_out}" if self.way_out else ""
        return redacted(_one_line(f"{head}{shown}: {self.text}{out}"))


def redacted(text: str) -> str:
    """Return a text in which passwords and queries of addresses are replaced by asterisks."""
    text = re.sub(r"(\w://)[^/\s'\"@]+@", r"\1***@", text)
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\"]+", r"\1?***", text)


def _one_line(text: str) -> str:
    """Return a text in which control characters, that may come from a file, are written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
