"""What somebody set, and where: file, environment, TRAINER_EXTRA_ARGS, command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer_core.catalogue import did_you_mean
from trainer_core.errors import Problem
from trainer_core.settings.files import plain

COMMAND_LINE = "command line"
ENVIRONMENT = "environment"
EXTRA_ARGS = "TRAINER_EXTRA_ARGS"
PREFIX = "TRAINER_"
_NUMBER = re.compile(r"-(\d|\.\d)")


@dataclass(frozen=True)
class Given:
    """A value and where it stands. bare: a ``--key`` of the command line without a value."""

    value: Any
    where: str
    bare: bool = False

    @property
    def is_null(self) -> bool:
        """Whether it asks for the default: null in a file, the word null elsewhere."""
        return self.value is None or self.value == "null"


def from_arguments(
    words: Sequence[str], *, where: str = COMMAND_LINE, flags: Iterable[str] = ()
) -> tuple[dict[str, Given], list[Problem]]:
    """Return the keys of ``--key value``, ``--key=value``, ``--flag`` and ``--no_flag``.

    flags: keys that take true or false, so that ``--no_x`` means x = false. Of one key given twice
    the last one counts. Words that belong to no key are problems.
    """
    found: dict[str, Given] = {}
    problems: list[Problem] = []
    known = set(flags)
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or len(word) == 2:
            problems.append(
                Problem(word, "belongs to no key.", where=where, has_value=False,
                        way_out="Write --key value; quote a value that holds spaces.")
            )  # fmt: skip
            continue
        name, is_joined, value = word.partition("=")
        key = plain(name)
        if is_joined:
            found[key] = Given(value, where)
        elif left and not _is_option(left[0]):
            found[key] = Given(left.pop(0), where)
        elif key.startswith("no_") and key not in known and key[3:] in known:
            found[key[3:]] = Given(False, where)
        else:
            found[key] = Given(True, where, bare=True)
    return found, problems


def _is_option(word: str) -> bool:
    return word.startswith("--") and not _NUMBER.match(word)


def from_extra_arguments(
    environ: Mapping[str, str], *, flags: Iterable[str] = ()
) -> tuple[dict[str, Given], list[Problem]]:
    """Return the keys of ``TRAINER_EXTRA_ARGS``, split like a shell does."""
    try:
        words = shlex.split(environ.get(EXTRA_ARGS, ""))
    except ValueError as error:
        text = f"cannot be split into words: {str(error).lower()}."
        return {}, [Problem(EXTRA_ARGS, text, where=ENVIRONMENT, has_value=False)]
    return from_arguments(words, where=EXTRA_ARGS, flags=flags)


def from_environment(
    environ: Mapping[str, str], *, known: Iterable[str]
) -> tuple[dict[str, Given], list[Problem]]:
    """Return the keys of ``TRAINER_<KEY>`` variables; a name that no key has is a problem."""
    keys = set(known)
    found: dict[str, Given] = {}
    problems: list[Problem] = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == EXTRA_ARGS:
            continue
        key = name.removeprefix(PREFIX).lower()
        if key in keys:
            found[key] = Given(environ[name], ENVIRONMENT)
            continue
        near = did_you_mean(name, [f"{PREFIX}{each.upper()}" for each in keys])
        problems.append(
            Problem(name, f"names no key{near or '.'}", where=ENVIRONMENT, has_value=False)
        )
    return found, problems


def respelled(
    found: Mapping[str, Given], spellings: Mapping[str, str]
) -> tuple[dict[str, Given], list[Problem]]:
    """Return the keys under the names that their owners use; two spellings of one are a problem."""
    result: dict[str, Given] = {}
    written: dict[str, str] = {}
    problems: list[Problem] = []
    for name, given in found.items():
        key = spellings.get(name, name)
        if key in result:
            text = f"'{written[key]}' and '{name}' are two names of one key."
            problems.append(Problem(key, text, where=given.where, has_value=False,
                                    way_out="Remove one of them."))  # fmt: skip
        result[key], written[key] = given, name
    return result, problems


def decoded(text: str) -> Any:
    """Return the JSON value of a text that looks like a list, an object or a quoted text."""
    word = text.strip()
    if not word.startswith(("[", "{", '"')):
        return text
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return text
