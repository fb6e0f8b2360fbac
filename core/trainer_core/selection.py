"""Which plugins a run has, why, and in which order.

A run has the plugins that were named, the provider of each value that the core settings name, those
that serve such a value beside it, what all of these require, and, when none were named, those whose
switch key is set. Every rule that is broken becomes a problem; nothing is raised, so that all problems
of a run are shown at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer_core.catalogue import Catalogue, Entry
from trainer_core.errors import Problem
from trainer_core.ordering import cycle, in_order
from trainer_core.settings.core import BUILTIN_OPTIMIZERS, CoreSettings

SELECTORS = {
    "model_family": (None,),
    "lora_type": (None,),
    "base_model_precision": (None, "no_change"),
    "text_encoder_1_precision": (None, "no_change"),
    "optimizer": (None, *BUILTIN_OPTIMIZERS),
    "report_to": (None, "none"),
}
"""Core keys whose values are provided by plugins, with the values that need none."""

IMPLIED = ("model_family", "lora_type", "report_to")
"""Those that follow from the plugin's name: naming wan is choosing its family."""


@dataclass(frozen=True)
class Choice:
    """A plugin of a run, and why it is there."""

    name: str
    why: str


@dataclass(frozen=True)
class Selection:
    """The plugins of a run in the order in which hooks run.

    implied: keys that naming a plugin sets → (value, plugin). problems: all broken rules.
    """

    choices: tuple[Choice, ...]
    implied: Mapping[str, tuple[Any, str]]
    problems: tuple[Problem, ...]


def select(
    catalogue: Catalogue,
    *,
    core: Mapping[str, Any],
    given: Mapping[str, Any],
    origins: Mapping[str, str],
    named: Sequence[str] | None = None,
    pending: Mapping[str, str] | None = None,
    roles: Sequence[str] = ("model",),
) -> Selection:
    """Return the plugins of a run.

    core: valid values of model_type and of :data:`SELECTORS`. given: the keys that somebody set.
    origins: where each of them stands. named: the list of ``plugins``, None to infer. pending: key
    or ``"key=value"`` of what is not built → its sentence. roles: what a run cannot do without.
    """
    selector = _Selector(catalogue, dict(core), given, origins, named, pending or {})
    selector.take_named()
    selector.take_values()
    selector.take_served()
    selector.take_switched()
    selector.take_required()
    selector.check(roles)
    return Selection(
        tuple(Choice(name, selector.chosen[name]) for name in selector.ordered()),
        selector.implied,
        tuple(selector.problems),
    )


def is_on(value: Any) -> bool:
    """Return whether the value of a switch key switches its plugin on."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "false", "no", "off", "0", "none", "null")
    return value is not None and value is not False


def is_flag(entry: Entry, key: str) -> bool:
    """Return whether ``key`` of a plugin takes true or false."""
    fields = entry.info.settings.model_fields if entry.info.settings else {}
    return key in fields and fields[key].annotation in (bool, bool | None)


@dataclass
class _Selector:
    catalogue: Catalogue
    core: dict[str, Any]
    given: Mapping[str, Any]
    origins: Mapping[str, str]
    named: Sequence[str] | None
    pending: Mapping[str, str]
    chosen: dict[str, str] = field(default_factory=dict)
    implied: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def say(self, key: str, text: str, way_out: str = "", **more: Any) -> None:
        where = self.origins.get(key, "")
        more.setdefault("has_value", "value" in more)
        self.problems.append(Problem(key, text, where=where, way_out=way_out, **more))

    def entries(self) -> list[Entry]:
        return [self.catalogue[name] for name in self.chosen]

    def values(self) -> list[tuple[str, str]]:
        """Return the (key, value) pairs of core's settings that a plugin must provide."""
        found = []
        for key, free in SELECTORS.items():
            if key == "lora_type" and self.core.get("model_type", "lora") != "lora":
                continue
            value = self.core.get(key)
            values = value if isinstance(value, (list, tuple)) else (value,)
            found += [(key, str(each)) for each in values if each not in free]
        return found

    # --- taking plugins -----------------------------------------------------------------------

    def take_named(self) -> None:
        where = self.origins.get("plugins", "")
        why = "named in --plugins" if where == "command line" else f"named in plugins ({where})"
        for name in self.named or ():
            entry = self.catalogue.get(name)
            if entry is None or entry.error:
                self.say("plugins", self.catalogue.explain_unknown(name))
                continue
            self.chosen.setdefault(name, why)
        for name in tuple(self.chosen):
            self.imply(self.catalogue[name])

    def imply(self, entry: Entry) -> None:
        """Set what naming a plugin means; one whose values were all decided against is wrong."""
        values: dict[str, list[str]] = {}
        for pair in entry.info.values:
            key, _, value = pair.partition("=")
            values.setdefault(key, []).append(value)
        wanted = [f"{key}={value}" for key, value in self.values()]
        useful = not values or entry.info.switch is not None or not set(values) <= set(SELECTORS)
        useful = useful or any(pair in wanted for pair in entry.info.values)
        for key, options in values.items():
            alone = len(options) == 1 and (key in IMPLIED or len(values) == 1)
            if alone and self.is_open(key) and f"{key}={options[0]}" not in wanted:
                useful = True
                self.core[key] = self.with_tracker(options[0]) if key == "report_to" else options[0]
                self.implied[key] = (self.core[key], entry.name)
        if useful:
            return
        if "lora_type" in values and self.core.get("model_type", "lora") != "lora":
            text, way_out = "model_type is not lora", "model_type = lora"
        else:
            key = next(iter(values))
            text = f"{key} is {_shown(self.core.get(key))}"
            way_out = " or ".join(pair.replace("=", " = ") for pair in entry.info.values)
        way_out = f"Set {way_out}, or leave {entry.name} out."
        self.say("plugins", f"'{entry.name}' is named, but {text}.", way_out)

    def is_open(self, key: str) -> bool:
        """Return whether naming a plugin may still decide the value of a core key."""
        if key == "lora_type" and self.core.get("model_type", "lora") != "lora":
            return False
        if key == "report_to":  # a list: trackers join those that were given
            return key not in self.given or tuple(self.core[key]) != ("none",)
        return key in SELECTORS and key not in self.given and key not in self.implied

    def with_tracker(self, name: str) -> tuple[str, ...]:
        others = tuple(each for each in self.core.get("report_to") or () if each != "none")
        return others if name in others else (*others, name)

    def take_values(self) -> None:
        for key, value in self.values():
            pair = f"{key}={value}"
            found = self.catalogue.providing(pair)
            if any(entry.name in self.chosen for entry in found):
                continue
            if len(found) == 1:
                self.chosen[found[0].name] = f"{key} is {value}"
            elif found:
                names = " and ".join(entry.name for entry in found)
                self.say(key, f"{names} both provide it.", "Name one in --plugins.", value=value)
            elif pair in self.pending:
                self.say(key, self.pending[pair], value=value)
            else:
                self.say(key, *self.unprovided(key), value=value)

    def unprovided(self, key: str) -> tuple[str, str]:
        values = [str(value) for value in SELECTORS[key] if value is not None]
        values += self.catalogue.values_of(key)
        allowed = ", ".join(dict.fromkeys(values))
        broken = ", ".join(f"{entry.name} ({entry.error})" for entry in self.catalogue.broken())
        text = "no installed plugin provides this value."
        if broken:
            text += f" Not usable: {broken}."
        way_out = f"Possible here: {allowed}." if allowed else "Install a plugin that provides it."
        return text, way_out

    def take_served(self) -> None:
        for entry in self.catalogue.usable():
            for pair in entry.info.serves:
                key, _, value = pair.partition("=")
                if str(self.given.get(key)) == value:
                    self.chosen.setdefault(entry.name, f"{key} is {value}")

    def take_switched(self) -> None:
        for entry in self.catalogue.usable():
            key = entry.info.switch
            if key is None:
                continue
            is_set = key in self.given
            on = is_set and is_on(self.given[key])
            if self.named is None and on:
                self.chosen.setdefault(entry.name, f"{key} is set")
                self.check_owner(entry, key)

    def check_owner(self, entry: Entry, key: str) -> None:
        others = [e for e in self.catalogue.owners(key) if e.name != entry.name]
        if others and self.named is None and others[0].name > entry.name:
            self.say(
                key, f"{entry.name} and {others[0].name} both own this key.",
                "Name one of them in --plugins.",
            )  # fmt: skip

    def take_required(self) -> None:
        waiting = list(self.chosen)
        while waiting:
            entry = self.catalogue[waiting.pop(0)]
            for need in entry.info.requires:
                if not isinstance(need, str):
                    continue
                if any(other.answers_to(need) for other in self.entries()):
                    continue
                if (found := self.provider(entry, need)) is not None:
                    self.chosen[found.name] = f"required by {entry.name}"
                    waiting.append(found.name)
        for entry in self.entries():
            self.switch_on(entry)

    def provider(self, entry: Entry, need: str) -> Entry | None:
        if need in self.catalogue and not self.catalogue[need].error:
            return self.catalogue[need]
        found = self.catalogue.answering(need)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(each.name for each in found)
            self.say(
                "plugins", f"'{entry.name}' requires '{need}', which {names} provide.",
                "Name one of them in --plugins.",
            )  # fmt: skip
        elif need in self.catalogue:
            reason = self.catalogue.explain_unknown(need)
            self.say("plugins", f"'{entry.name}' requires '{need}': {reason}")
        else:
            self.say(
                "plugins",
                f"'{entry.name}' requires '{need}'; no installed plugin has that name or role.",
                f"Install one, or leave {entry.name} out.",
            )
        return None

    def switch_on(self, entry: Entry) -> None:
        """Make a flag that switches the plugin true; an explicit false contradicts its presence."""
        key = entry.info.switch
        if key is None or not is_flag(entry, key):
            return
        if key not in self.given:
            self.implied[key] = (True, entry.name)
        elif not is_on(self.given[key]):
            why = self.chosen[entry.name]
            self.say(
                key, f"switches off '{entry.name}', which is {why}.",
                f"Remove the key, or leave {entry.name} out.", value=self.given[key],
            )  # fmt: skip

    # --- checking -----------------------------------------------------------------------------

    def check(self, roles: Sequence[str]) -> None:
        entries = self.entries()
        for index, first in enumerate(entries):
            for name in first.keys:
                if name in CoreSettings.model_fields:
                    self.say(name, f"'{first.name}' claims this key, which is core's.")
            for second in entries[index + 1 :]:
                self.check_pair(first, second)
        for role in roles:
            if not any(role in entry.info.provides for entry in entries):
                self.missing_role(role)
        self.check_capabilities()
        requires = {e.name: [self.resolve(n) for n in _names(e.info.requires)] for e in entries}
        if found := cycle(requires):
            text = f"these require each other in a circle: {' → '.join(found)}."
            self.say("plugins", text, "Leave all of them out; their authors must break the circle.")
        if found := cycle(self.after()):
            text = f"each of these wants to come after the next: {' → '.join(found)}."
            self.say("plugins", text, f"Leave {' or '.join(found[1:])} out.")

    def check_pair(self, first: Entry, second: Entry) -> None:
        both = f"'{first.name}' ({self.chosen[first.name]}) and '{second.name}' "
        both += f"({self.chosen[second.name]})"
        way_out = f"Leave {first.name} or {second.name} out."
        if roles := [role for role in first.info.provides if role in second.info.provides]:
            self.say("plugins", f"{both} both provide the role '{roles[0]}'.", way_out)
        elif any(second.answers_to(name) for name in first.info.conflicts) or any(
            first.answers_to(name) for name in second.info.conflicts
        ):
            self.say("plugins", f"{both} cannot share a run.", way_out)
        if keys := [key for key in first.keys if key in second.keys]:
            self.say(keys[0], f"{both} both own this key.", way_out)

    def missing_role(self, role: str) -> None:
        if role == "model":
            if "model_family" in {problem.key for problem in self.problems}:
                return  # the family that nobody provides was reported already
            families = ", ".join(self.catalogue.values_of("model_family"))
            way_out = f"Set model_family ({families})." if families else "Install a model's plugin."
            self.say("model_family", "is not set, so no plugin provides a model.", way_out)
        else:
            self.say("plugins", f"no plugin of the run provides the role '{role}'.")

    def check_capabilities(self) -> None:
        models = [entry for entry in self.entries() if "model" in entry.info.provides]
        if not models:
            return
        exposed = models[0].info.exposes
        for entry in self.entries():
            for need in entry.info.requires:
                if isinstance(need, type) and need not in exposed:
                    self.say(
                        "plugins",
                        f"'{entry.name}' requires a model with {need.__name__}, which "
                        f"'{models[0].name}' does not have.",
                        f"Leave {entry.name} out, or train another model.",
                    )

    def resolve(self, name: str) -> str:
        found = [entry.name for entry in self.entries() if entry.answers_to(name)]
        return found[0] if found else name

    def after(self) -> dict[str, list[str]]:
        entries = self.entries()
        return {
            entry.name: [
                other.name
                for other in entries
                if other is not entry and any(other.answers_to(n) for n in entry.info.after)
            ]
            for entry in entries
        }

    def ordered(self) -> list[str]:
        return in_order(self.after())


def _names(requires: Iterable[str | type]) -> list[str]:
    return [need for need in requires if isinstance(need, str)]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(value)
    return "not set" if value is None else f"{value}"
