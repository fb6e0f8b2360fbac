"""Which plugins are installed, and what each of them declares.

A plugin is imported to read its ``info``, never to let it act: nothing is attached before a run has
chosen it. A plugin that cannot be used keeps its place here with the reason, so that
``trainer plugins list`` shows it and only the runs that need it are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from typing import Any

from trainer_core import hookspecs
from trainer_core.errors import PluginError
from trainer_core.settings.owners import misnamed, spellings
from trainer_core.types import API_VERSION, PluginInfo

GROUP = "trainer.plugins"
_REFUSED_OPTIONS = {
    "tryfirst": "declare the order in PluginInfo.after",
    "trylast": "declare the order in PluginInfo.after",
    "hookwrapper": "write it as @hookimpl(wrapper=True)",
    "optionalhook": "every hook must exist",
}


@dataclass(frozen=True)
class Implementation:
    """A method of a plugin class that implements a hook. ``options``: those of pluggy's marker."""

    method: str
    hook: str
    options: Mapping[str, Any]

    @property
    def wrapper(self) -> bool:
        """Whether it surrounds the other implementations."""
        return bool(self.options.get("wrapper"))


@dataclass(frozen=True)
class Entry:
    """A plugin as it is installed.

    cls: its class, None where the import failed. error: why it cannot be used, empty if it can.
    distribution, version: of the package that brings it, empty for a class given in a script.
    """

    name: str
    cls: type | None
    info: PluginInfo = field(default_factory=PluginInfo)
    version: str = ""
    distribution: str = ""
    error: str = ""
    hooks: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that it owns."""
        return tuple(self.info.settings.model_fields) if self.info.settings else ()

    @property
    def spellings(self) -> Mapping[str, str]:
        """Every accepted spelling of its keys → the key."""
        return spellings(self.info.settings) if self.info.settings else {}

    def answers_to(self, name: str) -> bool:
        """Return whether ``name`` is its name or one of its roles."""
        return name == self.name or name in self.info.provides


class Catalogue(Mapping[str, Entry]):
    """Plugins by name, sorted. Build it with :meth:`installed`, or :meth:`of` classes at hand."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.name: entry for entry in sorted(entries, key=lambda e: e.name)}

    @classmethod
    def installed(cls) -> Catalogue:
        """Return the plugins of all installed distributions (entry point group :data:`GROUP`)."""
        found: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=GROUP):
            same = found.setdefault(point.name, [])
            if all(_distribution(point) != _distribution(other) for other in same):
                same.append(point)
        return cls(_load(name, points) for name, points in found.items())

    @classmethod
    def of(cls, plugins: Mapping[str, type]) -> Catalogue:
        """Return a catalogue of these classes, by the names that runs call them."""
        return cls(read_entry(name, plugin) for name, plugin in plugins.items())

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def usable(self) -> list[Entry]:
        """Return the plugins that can be used."""
        return [entry for entry in self.values() if not entry.error]

    def broken(self) -> list[Entry]:
        """Return the plugins that cannot be used."""
        return [entry for entry in self.values() if entry.error]

    def owners(self, key: str) -> list[Entry]:
        """Return the usable plugins that own ``key``."""
        return [entry for entry in self.usable() if key in entry.keys]

    def answering(self, name: str) -> list[Entry]:
        """Return the usable plugins with this name or role."""
        return [entry for entry in self.usable() if entry.answers_to(name)]

    def providing(self, value: str) -> list[Entry]:
        """Return the usable plugins that provide a ``"key=value"``."""
        return [entry for entry in self.usable() if value in entry.info.values]

    def values_of(self, key: str) -> list[str]:
        """Return the values of ``key`` that usable plugins provide."""
        pairs = (pair.partition("=") for entry in self.usable() for pair in entry.info.values)
        return sorted({value for name, _, value in pairs if name == key})

    def explain_unknown(self, name: str) -> str:
        """Return why ``name`` cannot be used: unknown (with the nearest name) or broken."""
        if name in self:
            return f"the plugin '{name}' cannot be used: {self[name].error}"
        near = did_you_mean(name, self)
        known = ", ".join(self) or "none"
        return f"no plugin is called '{name}'{near or '.'} Installed: {known}."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest choice, or an empty string."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def hook_names() -> frozenset[str]:
    """Return the names of all hooks."""
    marker = f"{hookspecs.PROJECT}_spec"
    return frozenset(name for name, value in vars(hookspecs).items() if hasattr(value, marker))


def implementations(plugin: type) -> list[Implementation]:
    """Return the hook implementations of a plugin class, checked against the rules of the host.

    Raises PluginError for a hook that does not exist, a hook's name without the marker, another
    project's marker, an argument that the hook does not pass, a wrapper of a hook that is not
    wrappable, and pluggy's own ordering options.
    """
    known = hook_names()
    found = []
    for method in dir(plugin):
        function = inspect.getattr_static(plugin, method)
        function = getattr(function, "__func__", function)  # static and class methods
        if not callable(function) or isinstance(function, type):
            continue
        options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        if options is None:
            _check_unmarked(method, function, known)
            continue
        implementation = Implementation(method, options.get("specname") or method, options)
        _check_marked(implementation, function, known)
        found.append(implementation)
    return found


def _check_unmarked(method: str, function: Any, known: frozenset[str]) -> None:
    if method in known:
        raise PluginError(f"its method '{method}' has the name of a hook but lacks @hookimpl")
    if method.startswith("_"):
        return
    for name, options in vars(function).items() if hasattr(function, "__dict__") else ():
        if name.endswith("_impl") and isinstance(options, dict) and "wrapper" in options:
            project = name.removesuffix("_impl")
            raise PluginError(
                f"its method '{method}' carries the marker of the project '{project}'; "
                "use hookimpl of trainer_core"
            )


def _check_marked(found: Implementation, function: Any, known: frozenset[str]) -> None:
    if found.hook not in known:
        near = did_you_mean(found.hook, known)
        raise PluginError(f"it implements the hook '{found.hook}', which does not exist{near}")
    for option, way_out in _REFUSED_OPTIONS.items():
        if found.options.get(option):
            raise PluginError(f"its hook '{found.hook}' is marked {option}; {way_out}")
    if found.wrapper and found.hook not in hookspecs.WRAPPABLE:
        allowed = ", ".join(sorted(hookspecs.WRAPPABLE))
        raise PluginError(
            f"it wraps the hook '{found.hook}'; wrappers are possible on {allowed} only"
        )
    if found.wrapper and not inspect.isgeneratorfunction(function):
        raise PluginError(f"its wrapper of '{found.hook}' has no yield")
    passed = list(inspect.signature(getattr(hookspecs, found.hook)).parameters)
    for argument in list(inspect.signature(function).parameters.values())[1:]:
        if argument.name not in passed and argument.default is argument.empty:
            raise PluginError(
                f"its hook '{found.hook}' asks for '{argument.name}'; "
                f"the hook passes {', '.join(passed)}"
            )


def read_entry(name: str, plugin: Any, *, version: str = "", distribution: str = "") -> Entry:
    """Return the entry of a plugin class; what is wrong with it stands in its ``error``."""
    info = getattr(plugin, "info", None)
    hooks: tuple[str, ...] = ()
    try:
        if not isinstance(plugin, type) or not isinstance(info, PluginInfo):
            raise PluginError("it is not a class with `info = PluginInfo(...)`")
        _check_info(name, info)
        hooks = tuple(dict.fromkeys(found.hook for found in implementations(plugin)))
        error = ""
    except PluginError as problem:
        error = str(problem)
    return Entry(
        name=name,
        cls=plugin if isinstance(plugin, type) else None,
        info=info if isinstance(info, PluginInfo) else PluginInfo(),
        version=version,
        distribution=distribution,
        error=error,
        hooks=hooks,
    )


def _check_info(name: str, info: PluginInfo) -> None:
    if info.api != API_VERSION:
        older = isinstance(info.api, int) and info.api < API_VERSION
        raise PluginError(
            f"it was written for plugin interface {info.api}, this trainer has {API_VERSION}; "
            f"upgrade {'the plugin' if older else 'trainer-core'}"
        )
    for what in ("provides", "values", "requires", "conflicts", "after", "exposes"):
        if not isinstance(getattr(info, what), tuple):
            raise PluginError(f"PluginInfo.{what} must be a tuple (is a comma missing?)")
    for pair in info.values:
        if "=" not in pair:
            raise PluginError(f"PluginInfo.values holds '{pair}'; write key=value")
    if info.settings is not None and info.settings.model_config.get("extra") != "forbid":
        raise PluginError("its settings model must derive from PluginSettings")
    keys = info.settings.model_fields if info.settings is not None else {}
    if info.switch is not None and info.switch not in keys:
        raise PluginError(f"PluginInfo.switch names '{info.switch}', which is not one of its keys")
    if wrong := misnamed(name, keys):
        raise PluginError(
            f"its key '{wrong[0]}' must begin with the plugin's name: "
            f"'{name.replace('-', '_')}_{wrong[0]}'"
        )


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else ""


def _load(name: str, points: list[metadata.EntryPoint]) -> Entry:
    point = points[0]
    version = point.dist.version if point.dist is not None else ""
    distribution = _distribution(point)
    if len(points) > 1:
        both = " and ".join(sorted(_distribution(each) for each in points))
        error = f"{both} both bring a plugin of this name; uninstall one of them"
        return Entry(name, None, version=version, distribution=distribution, error=error)
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:  # a stranger's import must not break other runs
        reason = f"its import failed: {type(error).__name__}: {error}"
        return Entry(name, None, version=version, distribution=distribution, error=reason)
    return read_entry(name, plugin, version=version, distribution=distribution)
