"""What a key allows, and what was wrong with a value, in the user's words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PHRASES = {
    "missing": "is required",
    "extra_forbidden": "is unknown here",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object, { ... }",
    "model_type": "must be an object, { ... }",
    "model_attributes_type": "must be an object, { ... }",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_CONTAINERS = (list, tuple, set, frozenset, dict)


def branches(annotation: Any) -> list[Any]:
    """Return the members of a union (without None), or the annotation alone."""
    return [branch for branch, _ in _bounded(annotation)]


def _bounded(annotation: Any, notes: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return (branch, what Annotated says of it) for each branch."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        notes = (
            *notes,
            *(m for n in more for m in (n.metadata if hasattr(n, "metadata") else [n])),
        )
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for a in get_args(annotation) for part in _bounded(a, notes)]
        return [part for part in parts if part[0] is not type(None)]
    return [(annotation, notes)]


def is_nested(annotation: Any) -> bool:
    """Return whether values have parts with names or types of their own, to be told one by one."""
    for branch in branches(annotation):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return True
        if get_origin(branch) in _CONTAINERS and any(is_nested(a) for a in get_args(branch)):
            return True
    return False


def takes(annotation: Any, *kinds: type) -> bool:
    """Return whether one branch of a union is one of ``kinds`` (containers by their origin)."""
    return any((get_origin(branch) or branch) in kinds for branch in branches(annotation))


def takes_objects(annotation: Any) -> bool:
    """Return whether a list or an object may be a value."""
    return takes(annotation, *_CONTAINERS, Any) or is_nested(annotation)


def choices(annotation: Any) -> list[str]:
    """Return the literal texts that are allowed."""
    return [
        str(value)
        for branch in branches(annotation)
        if get_origin(branch) is Literal
        for value in get_args(branch)
    ]


def allowed(field: FieldInfo) -> str:
    """Return what a field allows, such as "a whole number, at least 1"."""
    return _kind(field.annotation) + _limits(field.metadata)


def _limits(notes: Sequence[Any]) -> str:
    found = [
        f", {words} {_plain(bound)}"
        for note in notes
        for name, words in _BOUNDS.values()
        if (bound := getattr(note, name, None)) is not None
    ]
    return "".join(found)


def _kind(annotation: Any) -> str:
    words = []
    for branch, notes in _bounded(annotation):
        origin = get_origin(branch)
        if origin is Literal:
            values = [str(value) for value in get_args(branch)]
            words.append(f"one of {', '.join(values)}" if len(values) > 1 else f'"{values[0]}"')
        elif origin in (list, tuple, set, frozenset):
            words.append(f"a list of {_kind(get_args(branch)[0])}")
        elif origin is dict or (isinstance(branch, type) and issubclass(branch, BaseModel)):
            words.append("an object, { ... }")
        else:
            name = _NAMES.get(branch, getattr(branch, "__name__", str(branch)))
            words.append(name + _limits(notes))
    return " or ".join(dict.fromkeys(words))


def _plain(number: Any) -> str:
    return f"{number:g}" if isinstance(number, (int, float)) else str(number)


def wrong_value(field: FieldInfo, value: Any) -> tuple[str, str]:
    """Return what is wrong with the value of a plain field, and a way out (may be empty)."""
    way_out = ""
    options = choices(field.annotation)
    near = get_close_matches(str(value), options, n=1) if options else []
    if near:
        way_out = f"Did you mean '{near[0]}'?"
    elif isinstance(value, (int, float)) and branches(field.annotation) == [str]:
        way_out = "Put it in quotes."
    return f"must be {allowed(field)}.", way_out


def phrase(error: Mapping[str, Any]) -> str:
    """Return what is wrong in one of pydantic's errors, as a sentence."""
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "value_error":
        return sentence(error)
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {_plain(context.get(bound))}."
    if kind == "literal_error":
        return f"must be {context.get('expected')}."
    return _PHRASES.get(kind, f"is wrong: {error['msg']}").rstrip(".") + "."


def sentence(error: Mapping[str, Any]) -> str:
    """Return the sentence of a validator's ValueError."""
    return str(error["msg"]).removeprefix("Value error, ").rstrip(".") + "."


def place(location: Sequence[str | int]) -> str:
    """Return ``a.b[0].c`` for a location."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
