"""Building a settings model from what was given, with every problem in the user's words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainer_core.catalogue import did_you_mean
from trainer_core.errors import Problem, redacted
from trainer_core.settings import phrases
from trainer_core.settings.files import no_text
from trainer_core.settings.given import Given, decoded
from trainer_core.settings.owners import extra

M = TypeVar("M", bound=BaseModel)
MASK = "***"
_SECRET = re.compile(
    "token|secret|passw|passphrase|api_?key|webhook|credential|auth", re.IGNORECASE
)


def validate(
    model: type[M], given: Mapping[str, Given], *, owner: str = ""
) -> tuple[M | None, list[Problem]]:
    """Return the settings and all problems. With problems, wrong keys stand at their defaults.

    None only where even that is impossible (a required key is missing). ``owner``: the plugin, for
    the message about a required key.
    """
    problems: list[Problem] = []
    bad: set[str] = set()
    values: dict[str, Any] = {}
    for name, item in given.items():
        value, problem = _prepared(name, item, model.model_fields[name])
        if problem is not None:
            problems.append(problem)
            bad.add(name)
        elif not item.is_null:
            values[name] = value
    for _ in range(len(given) + 1):
        try:
            return model.model_validate(values), problems
        except ValidationError as error:
            before = len(values)
            problems += _translate(error, model, given, values, bad, owner)
        if len(values) == before:
            break
    return None, problems


def shown(field: FieldInfo, value: Any) -> Any:
    """Return a value as messages and files may show it: a secret, a password in an address masked."""
    if isinstance(value, str):
        value = redacted(value)
    return MASK if extra(field, "secret") and value is not None else value


def shown_unknown(name: str, value: Any, *, secrets: Iterable[str] = ()) -> Any:
    """Return the value of a key that nobody owns, masked where the name sounds like a secret.

    secrets: known keys that hold one; a near miss of such a key holds one too.
    """
    return MASK if _SECRET.search(name) or get_close_matches(name, list(secrets), n=1) else value


def _prepared(name: str, item: Given, field: FieldInfo) -> tuple[Any, Problem | None]:
    """Return the value that pydantic gets: JSON in texts is read, true is not a number."""
    annotation, value = field.annotation, item.value
    if isinstance(value, str) and (reason := no_text(value)):
        return None, Problem(name, f"{reason}.", shown(field, value), item.where)
    if isinstance(value, str):
        only_text = phrases.takes(annotation, str) and not phrases.takes_objects(annotation)
        value = value if only_text else decoded(value)
    if isinstance(value, bool) and not phrases.takes(annotation, bool):
        if item.bare:
            return None, Problem(
                name, f"needs a value: {phrases.allowed(field)}.", where=item.where, has_value=False
            )
        if phrases.takes(annotation, int, float):
            text, way_out = phrases.wrong_value(field, value)
            return None, Problem(name, text, value, item.where, way_out)
    return value, None


def _translate(
    error: ValidationError,
    model: type[BaseModel],
    given: Mapping[str, Given],
    values: dict[str, Any],
    bad: set[str],
    owner: str,
) -> list[Problem]:
    """Return the new problems of one validation; removes the keys at fault from ``values``."""
    problems: list[Problem] = []
    fresh: set[str] = set()
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if not name:
            mentioned = _mentioned(phrases.sentence(item), model)
            if not mentioned & bad:
                problems.append(_cross(item, mentioned, given))
            fresh |= mentioned
            continue
        field = model.model_fields[name]
        plain = not phrases.is_nested(field.annotation) and item["type"] != "missing"
        if name in bad or (plain and name in fresh):
            continue
        fresh.add(name)
        problems.append(_single(name, field, item, given, values.get(name), owner))
    bad |= fresh
    for name in fresh:
        values.pop(name, None)
    return problems


def _mentioned(text: str, model: type[BaseModel]) -> set[str]:
    words = set(re.findall(r"\w+", text))
    return words & set(model.model_fields)


def _cross(item: Any, mentioned: set[str], given: Mapping[str, Given]) -> Problem:
    keys = sorted(mentioned)
    places = dict.fromkeys(given[key].where for key in keys if key in given)
    return Problem(
        ", ".join(keys) or "settings",
        phrases.sentence(item),
        where=", ".join(places),
        has_value=False,
    )


def _single(
    name: str, field: FieldInfo, item: Any, given: Mapping[str, Given], value: Any, owner: str
) -> Problem:
    where = given[name].where if name in given else ""
    kind, location = item["type"], item["loc"]
    if kind == "missing" and len(location) == 1:
        by = f" by the plugin {owner}" if owner else ""
        text = f"is required{by}. {field.description or ''}".rstrip()
        way_out = f"Set it to {phrases.allowed(field)}."
        return Problem(name, text, where=where, has_value=False, way_out=way_out)
    if not phrases.is_nested(field.annotation) and kind != "value_error":
        text, way_out = phrases.wrong_value(field, value)
        return Problem(name, text, shown(field, value), where, way_out)
    text = phrases.phrase(item)
    if kind == "extra_forbidden":
        text = f"is unknown here{_near(field, location) or '.'}"
    has_value = kind not in ("missing", "extra_forbidden")
    found = shown(field, item.get("input"))
    return Problem(phrases.place(location), text, found, where, has_value=has_value)


def _near(field: FieldInfo, location: tuple[str | int, ...]) -> str:
    """Return a did-you-mean for an unknown key inside a nested value."""
    names: set[str] = set()
    seen: list[Any] = []
    waiting: list[Any] = [field.annotation]
    while waiting:
        for branch in phrases.branches(waiting.pop()):
            if branch in seen:  # a model may hold itself
                continue
            seen.append(branch)
            if isinstance(branch, type) and issubclass(branch, BaseModel):
                names |= set(branch.model_fields)
                waiting += [inner.annotation for inner in branch.model_fields.values()]
            else:
                waiting += [a for a in getattr(branch, "__args__", ()) if a is not Ellipsis]
    return did_you_mean(str(location[-1]), names)
