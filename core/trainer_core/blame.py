"""Which plugin raised: its name, hook and keys are added to the error as a note."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any

from trainer_core.errors import PluginError

if TYPE_CHECKING:
    from trainer_core.plugins import Host

_MAX_KEYS = 8
METHODS = ("check", "attach", "encoders", "parameters", "state_dict", "load_state_dict")


@contextmanager
def blame(host: Host) -> Iterator[None]:
    """Add a note to an error that a plugin of ``host`` raised in this block, and let it pass."""
    try:
        yield
    except SystemExit as error:
        found = _culprit(error, host)
        if found is None:
            raise
        text = f"the plugin '{found[0]}' ended the process"
        raise PluginError(f"{text}{f' in {found[1]}' if found[1] else ''}; leave it out") from error
    except Exception as error:
        note(error, host)
        raise


def note(error: BaseException, host: Host) -> None:
    """Add "in plugin x, hook y (its keys: ...)" to an error, once, where its traceback tells."""
    if any(text.startswith("in plugin ") for text in notes(error)):
        return
    found = _culprit(error, host)
    if found is None:
        return
    plugin, place = found
    where = f"in plugin '{plugin}'" + (f", {place}" if place else "")
    keys = _keys(plugin, host)
    add_note(error, f"{where}{f' (its keys: {keys})' if keys else ''}")


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an error. Python 3.10 has no ``add_note``; the list is the same."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        vars(error)["__notes__"] = [*notes(error), text]


def notes(error: BaseException) -> list[str]:
    """Return the notes of an error."""
    return list(getattr(error, "__notes__", ()))


def _culprit(error: BaseException, host: Host) -> tuple[str, str | None] | None:
    """Return the plugin of the innermost frame that is a plugin's, and the hook it was in."""
    hooks = _codes(host)
    packages = _packages(host)
    chain: BaseException | None = error
    while chain is not None:
        plugin, hook = None, None
        inside = False  # a script that calls core is no plugin, even where it defines one
        for code, module in _frames(chain.__traceback__):
            package = module.partition(".")[0]
            inside = inside or (package == "trainer_core" and module != __name__)
            if code in hooks:
                plugin, hook = hooks[code]
            elif inside and (owner := packages.get(package)) is not None and owner != plugin:
                plugin, hook = owner, None
        if plugin is not None:
            return plugin, hook
        chain = chain.__cause__ or chain.__context__
    return None


def _codes(host: Host) -> dict[CodeType, tuple[str, str]]:
    """Return the code of each hook and optional method → (plugin, place); shared code has no owner."""
    found: dict[CodeType, tuple[str, str]] = {}
    shared: set[CodeType] = set()
    known = [(name, f"hook {hook}", function) for name, hook, function in host.implementations()]
    for name, plugin in host.all_plugins().items():
        for method in METHODS:
            if (function := getattr(plugin, method, None)) is not None:
                known.append((name, f"method {method}", function))
    for name, place, function in known:
        # a bound method hands on its function's code; one whose answers are checked wraps it
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None:
            continue
        if code in found and found[code][0] != name:
            shared.add(code)
        found[code] = (name, place)
    return {code: owner for code, owner in found.items() if code not in shared}


def _packages(host: Host) -> dict[str, str]:
    """Return top-level package → plugin, for the packages that belong to one plugin alone."""
    found: dict[str, str | None] = {}
    for name, plugin in host.all_plugins().items():
        package = type(plugin).__module__.partition(".")[0]
        found[package] = None if package in found else name
    found.pop("trainer_core", None)
    return {package: name for package, name in found.items() if name is not None}


def _frames(traceback: TracebackType | None) -> Iterator[tuple[CodeType, str]]:
    while traceback is not None:
        frame = traceback.tb_frame
        yield frame.f_code, str(frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next


def _keys(plugin: str, host: Host) -> str:
    """Return the plugin's keys: those that were set with their values, else their names."""
    settings = host.settings.get(plugin)
    if settings is None:
        return ""
    fields = type(settings).model_fields
    was_set = [name for name in fields if name in settings.model_fields_set]
    shown = [f"{name} = {_value(settings, name)}" for name in was_set] or list(fields)
    more = len(shown) - _MAX_KEYS
    return ", ".join(shown[:_MAX_KEYS]) + (f" and {more} more" if more > 0 else "")


def _value(settings: Any, name: str) -> str:
    extra = type(settings).model_fields[name].json_schema_extra
    if isinstance(extra, dict) and extra.get("secret"):
        return "***"
    text = repr(getattr(settings, name))
    return text if len(text) <= 60 else text[:59] + "…"
