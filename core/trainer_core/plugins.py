"""The plugin host: builds the plugins of a run and calls their hooks in the declared order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import pluggy

from trainer_core import hookspecs
from trainer_core.answers import checked
from trainer_core.blame import add_note
from trainer_core.catalogue import Catalogue, Entry, hook_names, implementations
from trainer_core.errors import PluginError, TrainerError
from trainer_core.hooks import Hooks
from trainer_core.types import PluginInfo

if TYPE_CHECKING:
    from pydantic import BaseModel

    from trainer_core.settings.load import Resolved

__all__ = ["Catalogue", "Host", "NamedPlugin", "Plugin", "build"]


Observer = Callable[[str, str, Callable[..., Any]], Callable[..., Any]]
"""``observer(plugin, hook, call)`` returns what is called in the place of ``call``."""


class Plugin(Protocol):
    """What core needs of a plugin: its declaration. Everything else is a hook or an option."""

    info: PluginInfo


class NamedPlugin(Plugin, Protocol):
    """One of core's own plugins, which answer after all others."""

    name: str


class Host:
    """The plugins of one run.

    hooks: calls every implementation; first-result hooks ask the last plugin of the order first and
    core's own last; the last plugin's wrapper is the outermost. plugins: name → instance, in order,
    without core's own. settings: name → validated settings, None for a plugin without keys.
    check_answers: refuse answers of a wrong kind, naming the plugin and the hook.
    """

    def __init__(
        self,
        plugins: Mapping[str, Plugin],
        *,
        settings: Mapping[str, BaseModel | None] | None = None,
        builtins: Sequence[NamedPlugin] = (),
        check_answers: bool = False,
    ) -> None:
        self.plugins = dict(plugins)
        self._check_answers = check_answers
        self.settings = dict(settings or {})
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._called: dict[str, tuple[tuple[str, Callable[..., Any]], ...]] = {}
        self._everyone: dict[str, Plugin] = {}
        for plugin in builtins:
            self._register(plugin.name, plugin)
        for name, chosen in self.plugins.items():
            self._register(name, chosen)
        self._manager.check_pending()

    def _register(self, name: str, plugin: Plugin) -> None:
        if name in self._everyone:
            raise PluginError(f"two plugins of the run are called '{name}'; rename one of them")
        try:
            implementations(type(plugin))
            self._manager.register(plugin, name)
        except (PluginError, pluggy.PluginValidationError) as error:
            raise PluginError(f"the plugin '{name}' cannot be used: {error}") from error
        self._everyone[name] = plugin
        for caller in self._manager.get_hookcallers(plugin) or () if self._check_answers else ():
            for found in caller.get_hookimpls():
                if found.plugin is plugin and not found.wrapper:
                    function = checked(name, caller.name, found.function)
                    found.function = function  # type: ignore[misc]  # pluggy offers no other place

    @property
    def hooks(self) -> Hooks:
        """Callers of all implementations, with keyword arguments."""
        return cast("Hooks", self._manager.hook)

    def calls(self, hook: str) -> tuple[tuple[str, Callable[..., Any]], ...]:
        """Return (plugin, callable) of each implementation of a hook: core's own, then in order.

        Each callable takes all keyword arguments of the hook and hands on those that the plugin
        asks for. For the hooks where core must know who answered; none of them has wrappers.
        """
        if hook not in self._called:
            found = {i.plugin_name: i for i in getattr(self._manager.hook, hook).get_hookimpls()}
            self._called[hook] = tuple(
                (name, _caller(found[name])) for name in self._everyone if name in found
            )
        return self._called[hook]

    def observe(self, observer: Observer) -> None:
        """Let an observer wrap what :meth:`calls` returns for the plugins of the run, not core's own."""
        for hook in hook_names():
            self._called[hook] = tuple(
                (name, observer(name, hook, call) if name in self.plugins else call)
                for name, call in self.calls(hook)
            )

    def implementations(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Return (plugin, hook, function) of every implementation."""
        return [
            (implementation.plugin_name, caller.name, implementation.function)
            for plugin in self._everyone.values()
            for caller in self._manager.get_hookcallers(plugin) or ()
            for implementation in caller.get_hookimpls()
            if implementation.plugin is plugin
        ]

    def all_plugins(self) -> Mapping[str, Plugin]:
        """Return name → instance of core's own plugins and those of the run."""
        return dict(self._everyone)


def _caller(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    function, wanted = implementation.function, implementation.argnames

    def call(**arguments: Any) -> Any:
        return function(*[arguments[name] for name in wanted])

    return call


def build(
    resolved: Resolved, *, catalogue: Catalogue, builtins: Sequence[NamedPlugin] = ()
) -> Host:
    """Return the host of a run: its plugins built from their settings, in order.

    builtins: core's own plugins. An error in a plugin's constructor carries a note with its name.
    """
    plugins = {
        choice.name: _construct(catalogue[choice.name], resolved.plugins[choice.name])
        for choice in resolved.choices
    }
    return Host(plugins, settings=resolved.plugins, builtins=builtins, check_answers=True)


def _construct(entry: Entry, settings: BaseModel | None) -> Plugin:
    if entry.cls is None or entry.error:
        raise PluginError(f"the plugin '{entry.name}' cannot be used: {entry.error}")
    try:
        plugin = entry.cls(settings)
    except TrainerError:
        raise
    except SystemExit as error:
        raise PluginError(
            f"the plugin '{entry.name}' ended the process while it was built from its settings; "
            f"leave {entry.name} out of --plugins, or tell its author"
        ) from error
    except Exception as error:
        add_note(error, f"raised while the plugin '{entry.name}' was built from its settings")
        raise
    return cast("Plugin", plugin)
