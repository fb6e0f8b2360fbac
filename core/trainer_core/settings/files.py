"""Reading JSON files: comments and trailing commas allowed, duplicate keys refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from trainer_core.errors import ConfigError, Problem

DEFAULT_CONFIG = Path("config/config.json")
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<word>[^\W\d][\w$]*)
      | (?P<mark>[{}\[\]:,])""",
    re.VERBOSE | re.DOTALL,
)


def read_config(path: Path | None = None) -> dict[str, Any]:
    """Return the keys of a config file; a leading ``--`` of a key is dropped.

    ``path`` None: :data:`DEFAULT_CONFIG`. Raises ConfigError with file, line and column.
    """
    file = DEFAULT_CONFIG if path is None else path
    if path is None and not file.exists():
        raise _problem(
            file,
            f"there is no {file} here.",
            "Name a config file with --config FILE, or start from a preset: copy one of config/.",
        )
    content = read_json(file, flag="--config")
    if not isinstance(content, dict):
        raise _problem(file, f"holds {_kind(content)}; it must hold one object, {{ ... }}.")
    keys: dict[str, Any] = {}
    for written, value in content.items():
        name = plain(written)
        if name in keys:
            raise _problem(file, f"'{name}' stands there twice ('{name}' and '--{name}').")
        keys[name] = value
    return keys


def plain(name: str) -> str:
    """Return a key as its owner spells it: without leading dashes, underscores for dashes."""
    return name.strip().removeprefix("--").replace("-", "_")


def read_json(path: Path, *, flag: str = "") -> Any:
    """Return the content of a JSON file that may hold comments and trailing commas.

    ``flag``: the key that names the file, for the message when it is missing. Raises ConfigError
    with file, line and column; a key that stands twice in one object is an error.
    """
    named = f" ({flag})" if flag else ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _problem(path, f"there is no such file{named}.") from None
    except IsADirectoryError:
        raise _problem(path, f"is a folder{named}; name the file in it.") from None
    except UnicodeDecodeError as error:
        raise _problem(path, f"is not UTF-8 text (byte {error.start}){named}.") from None
    except OSError as error:
        raise _problem(path, f"cannot be read{named}: {error.strerror}.") from None
    try:
        content = _parse(path, text)
        _check_duplicates(path, text)
        _check_values(path, content)
    except RecursionError:
        raise _problem(path, "is nested too deeply.") from None
    return content


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass  # comments and trailing commas are the slower parser's
    except ValueError as error:  # a number of thousands of digits
        raise _problem(path, f"is not usable JSON: {error}.") from None
    import json5

    try:
        return json5.loads(text)
    except ValueError as error:
        found = re.match(r"<string>:(\d+) (.*?)(?: at column (\d+))?$", str(error), re.DOTALL)
        if found is None:
            raise _problem(path, f"is not valid JSON: {error}.") from None
        line, reason, column = found.groups()
        place = f"line {line}, column {column}" if column else f"line {line}"
        raise _problem(path, f"is not valid JSON: {place}: {reason}.") from None


def _check_duplicates(path: Path, text: str) -> None:
    """Refuse a key that stands twice in one object; parsers silently take the last one."""
    stack: list[set[str] | None] = []  # a set of keys for each open object, None for each list
    pending: tuple[str, int] | None = None
    for token in _TOKEN.finditer(text):
        kind, word = token.lastgroup, token.group()
        if kind == "comment":
            continue
        if kind != "mark":
            pending = (word.strip("\"'") if kind == "string" else word, token.start())
            continue
        if word == ":" and pending is not None and stack and (keys := stack[-1]) is not None:
            name, start = pending
            if name in keys:
                line = text.count("\n", 0, start) + 1
                column = start - text.rfind("\n", 0, start)
                raise _problem(
                    path, f"line {line}, column {column}: '{name}' stands there twice.",
                    "Remove one of them.",
                )  # fmt: skip
            keys.add(name)
        elif word in "{[":
            stack.append(set() if word == "{" else None)
        elif word in "}]" and stack:
            stack.pop()
        pending = None


def _check_values(path: Path, value: Any, place: str = "") -> None:
    """Refuse numbers that are not finite, and texts that are none: halves of characters, zero bytes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _problem(path, f"{place or 'the file'} is not a finite number.")
    if isinstance(value, str) and (reason := no_text(value)):
        raise _problem(path, f"{place or 'the file'} {reason}.")
    if isinstance(value, dict):
        for name, item in value.items():
            if reason := no_text(str(name)):
                raise _problem(path, f"the key {str(name)!r} {reason}.")
            _check_values(path, item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(path, item, f"{place}[{index}]")


def no_text(text: str) -> str:
    """Return why a text can be neither written nor a path, or an empty string."""
    if "\0" in text:
        return "holds a zero byte; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a character (a lone surrogate); write it in UTF-8"
    return ""


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _problem(path: Path, text: str, way_out: str = "") -> ConfigError:
    return ConfigError([Problem(str(path), text, has_value=False, way_out=way_out)])
