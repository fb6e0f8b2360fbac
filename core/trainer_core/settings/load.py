"""From files, environment and command line to the validated settings of a run and its plugins.

Precedence, weakest first: defaults, file, ``TRAINER_<KEY>`` in the environment,
``TRAINER_EXTRA_ARGS``, command line. ``null`` means the default. Everything that is wrong is
reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer_core.catalogue import Catalogue, Entry, did_you_mean
from trainer_core.errors import ConfigError, Problem
from trainer_core.selection import SELECTORS, Choice, Selection, is_on, select
from trainer_core.settings import given as sources
from trainer_core.settings.core import CoreSettings
from trainer_core.settings.files import DEFAULT_CONFIG, read_config
from trainer_core.settings.given import Given
from trainer_core.settings.owners import expected_owner, extra, spellings
from trainer_core.settings.pending import pending_sentences
from trainer_core.settings.validate import shown, shown_unknown, validate


@dataclass(frozen=True)
class Resolved:
    """The settings of a run.

    core: core's keys. plugins: plugin → its settings (None where it has no keys), in the order in
    which hooks run. choices: why each is there. origins: key → where it was set; keys at their
    defaults are absent. unused: sentences about keys of plugins that are not in the run. entries:
    the plugins as they are installed.
    """

    core: CoreSettings
    plugins: Mapping[str, BaseModel | None]
    choices: tuple[Choice, ...]
    origins: Mapping[str, str]
    unused: tuple[str, ...]
    entries: Mapping[str, Entry]

    def resolved(self) -> dict[str, Any]:
        """Return key → JSON-able value of core and of the run's plugins, secrets masked."""
        return {
            name: value
            for model in (self.core, *self.plugins.values())
            if model is not None
            for name, value in _flat(model).items()
        }

    def fixed(self) -> dict[str, Any]:
        """Return the keys that a resume may not change → value: those not declared ``free``."""
        lasting = set(self.lasting_plugins())
        models = [self.core, *(m for name, m in self.plugins.items() if name in lasting)]
        return {
            name: value
            for model in models
            if model is not None
            for name, value in _flat(model).items()
            if not extra(type(model).model_fields[name], "free")
        }

    def lasting_plugins(self) -> tuple[str, ...]:
        """Return the plugins that a resume may not change: all but those that a free key chooses.

        A tracker is one of the latter: ``report_to`` is free.
        """
        return tuple(
            name for name in self.plugins if not _only_free(self.entries[name].info.values)
        )


@contextmanager
def located(resolved: Resolved) -> Iterator[None]:
    """Add to a ConfigError of this block where each key of it was set, if it does not say so."""
    try:
        yield
    except ConfigError as error:
        origins = resolved.origins
        for_user = [replace(p, where=p.where or origins.get(p.key, "")) for p in error.problems]
        raise ConfigError(for_user) from error


def _flat(model: BaseModel) -> dict[str, Any]:
    fields = type(model).model_fields
    return {
        name: shown(fields[name], value) for name, value in model.model_dump(mode="json").items()
    }


def _only_free(values: Sequence[str]) -> bool:
    keys = [pair.partition("=")[0] for pair in values]
    fields = CoreSettings.model_fields
    return bool(keys) and all(key in fields and extra(fields[key], "free") for key in keys)


def resolve(
    config: Path | Mapping[str, Any] | None = None,
    *,
    args: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    catalogue: Catalogue | None = None,
    pending: Mapping[str, str] | None = None,
    roles: Sequence[str] = ("model",),
) -> Resolved:
    """Return the settings of a run, or raise one ConfigError with all problems.

    config: the config file, or the keys that it would hold, None for ``--config`` in the arguments or
    else ``config/config.json``.
    args: words of the command line. environ: None for the process's own. catalogue: None for the
    installed plugins. pending: None for ``pending.json``. roles: what a run cannot do without.
    """
    resolver = _Resolver(
        Catalogue.installed() if catalogue is None else catalogue,
        pending_sentences() if pending is None else pending,
    )
    resolver.gather(config, args, os.environ if environ is None else environ)
    return resolver.resolve(roles)


class _Resolver:
    def __init__(self, catalogue: Catalogue, pending: Mapping[str, str]) -> None:
        self.catalogue = catalogue
        self.pending = pending
        self.problems: list[Problem] = []
        self.given: dict[str, Given] = {}
        self.spellings = dict(spellings(CoreSettings))
        for entry in catalogue.usable():
            self.spellings = {**entry.spellings, **self.spellings}

    # --- where values come from ---------------------------------------------------------------

    def gather(
        self,
        config: Path | Mapping[str, Any] | None,
        args: Sequence[str],
        environ: Mapping[str, str],
    ) -> None:
        """Merge all sources; ``--config`` may stand in the arguments."""
        flags = self.flags()
        line, problems = sources.from_arguments(args, flags=flags)
        extras, more = sources.from_extra_arguments(environ, flags=flags)
        known = {*self.spellings, *self.pending}
        variables, wrong = sources.from_environment(environ, known=known)
        source = config
        for found in (extras, line):
            if (named := found.pop("config", None)) is not None and config is None:
                source = Path(str(named.value))
        if isinstance(source, Mapping):
            keys, where = source, "the run's settings"
        else:
            keys, where = read_config(source), str(DEFAULT_CONFIG if source is None else source)
        content = {name: Given(value, where) for name, value in keys.items()}
        self.problems += [*problems, *more, *wrong]
        for given in (content, variables, extras, line):
            found, problems = sources.respelled(given, self.spellings)
            self.given |= found
            self.problems += problems

    def flags(self) -> set[str]:
        """Return the keys that take true or false."""
        models = [CoreSettings, *(entry.info.settings for entry in self.catalogue.usable())]
        return {
            name
            for model in models
            if model is not None
            for name, field in model.model_fields.items()
            if field.annotation in (bool, bool | None)
        }

    def secrets(self) -> list[str]:
        """Return the keys whose values are never shown."""
        models = [entry.info.settings for entry in self.catalogue.usable()]
        fields = [item for model in models if model for item in model.model_fields.items()]
        return [name for name, field in fields if extra(field, "secret")]

    # --- what they mean -----------------------------------------------------------------------

    def resolve(self, roles: Sequence[str]) -> Resolved:
        """Validate everything; raise all problems together."""
        self.refuse_pending()
        self.given = {name: item for name, item in self.given.items() if not item.is_null}
        core_given = {k: v for k, v in self.given.items() if k in CoreSettings.model_fields}
        core, problems = validate(CoreSettings, core_given)
        self.problems += problems
        core = core or CoreSettings()
        selection = self.selection(core, roles)
        self.refuse_unknown(core)
        implied = {
            key: Given(value, f"plugins ({plugin})")
            for key, (value, plugin) in selection.implied.items()
        }
        self.given |= implied
        core_given |= {k: v for k, v in implied.items() if k in CoreSettings.model_fields}
        settled, _ = validate(CoreSettings, core_given)
        settings = {choice.name: self.settings_of(choice.name) for choice in selection.choices}
        if self.problems:
            raise ConfigError({str(problem): problem for problem in self.problems}.values())
        return Resolved(
            core=settled or core,
            plugins=settings,
            choices=selection.choices,
            origins={name: item.where for name, item in self.given.items()},
            unused=tuple(self.unused(core, selection)),
            entries={choice.name: self.catalogue[choice.name] for choice in selection.choices},
        )

    def selection(self, core: CoreSettings, roles: Sequence[str]) -> Selection:
        values = {name: getattr(core, name) for name in ("model_type", *SELECTORS)}
        selection = select(
            self.catalogue,
            core=values,
            given={name: item.value for name, item in self.given.items()},
            origins={name: item.where for name, item in self.given.items()},
            named=core.plugins,
            pending=self.pending,
            roles=roles,
        )
        self.problems += selection.problems
        return selection

    def settings_of(self, name: str) -> BaseModel | None:
        """Return a plugin's settings; problems are noted."""
        model = self.catalogue[name].info.settings
        if model is None:
            return None
        mine = {key: item for key, item in self.given.items() if key in model.model_fields}
        settings, problems = validate(model, mine, owner=name)
        self.problems += problems
        return settings

    def owned(self, key: str) -> bool:
        return key in CoreSettings.model_fields or bool(self.catalogue.owners(key))

    def refuse_pending(self) -> None:
        """Refuse keys, and values of owned keys, that are known but not built."""
        for key, item in tuple(self.given.items()):
            sentence = None
            if not self.owned(key):
                sentence = self.pending.get(key)
            elif key not in SELECTORS:  # the values of selectors may have a provider
                sentence = self.pending.get(f"{key}={item.value}")
            if sentence is not None:
                value = "" if item.bare else shown_unknown(key, item.value)
                self.problems.append(
                    Problem(key, sentence, value, item.where, has_value=not item.bare)
                )
                del self.given[key]

    def refuse_unknown(self, core: CoreSettings) -> None:
        for key, item in tuple(self.given.items()):
            if self.owned(key) or (core.plugins is not None and self.broken_owner(key, core)):
                continue
            owner = expected_owner(key)
            if owner in self.catalogue:
                text, way_out = self.catalogue.explain_unknown(str(owner)) + ".", ""
                if not self.catalogue[str(owner)].error:
                    text = (
                        f"unknown key; the installed version of the plugin {owner} has none of it."
                    )
            elif owner is not None:
                text = f"unknown key; it belongs to the plugin {owner}, which is not installed."
                way_out = f"Install {owner}, or remove the key."
            else:
                known = [name for name in (*self.spellings, *self.pending) if "=" not in name]
                near = did_you_mean(key, known)
                text, way_out = f"unknown key{near or '.'}", "" if near else "Remove it."
            value = shown_unknown(key, item.value, secrets=self.secrets())
            self.problems.append(Problem(key, text, value, item.where, way_out))
            del self.given[key]

    def broken_owner(self, key: str, core: CoreSettings) -> Entry | None:
        """Return the plugin that cannot be used, is not named, and seems to own ``key``."""
        for entry in self.catalogue.broken():
            mine = key == entry.name or key.startswith(f"{entry.name.replace('-', '_')}_")
            mine = mine or key in entry.keys or expected_owner(key) == entry.name
            if mine and entry.name not in (core.plugins or ()):
                return entry
        return None

    def unused(self, core: CoreSettings, selection: Selection) -> list[str]:
        """Return a sentence for each plugin outside the run whose keys were set."""
        chosen = {choice.name for choice in selection.choices}
        idle: dict[str, list[str]] = {}
        for key, item in self.given.items():
            if key in CoreSettings.model_fields:
                continue
            owners = self.catalogue.owners(key)
            if any(entry.name in chosen for entry in owners):
                continue
            entry = owners[0] if owners else self.broken_owner(key, core)
            if entry is None or (key == entry.info.switch and not is_on(item.value)):
                continue
            idle.setdefault(entry.name, []).append(key)
        return [_no_effect(self.catalogue[name], keys, core) for name, keys in idle.items()]


def _no_effect(entry: Entry, keys: Sequence[str], core: CoreSettings) -> str:
    verb = "has" if len(keys) == 1 else "have"
    where = "--plugins" if core.plugins is not None else "this run"
    text = f"{', '.join(keys)} {verb} no effect: {entry.name} is not in {where}"
    if core.plugins is None and entry.info.switch:
        text += f" ({entry.info.switch} switches it on)"
    return text
