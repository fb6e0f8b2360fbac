"""Every two of our plugins train together, or say that they cannot."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trainer_core.errors import ConfigError, PluginError
from trainer_core.testing.contract import PluginContract
from trainer_core.testing.harness import attempt

ROOT = Path(__file__).parents[2]
STEPS = 3
Contract = type[PluginContract]


def load(file: Path) -> ModuleType | None:
    """Import a contract test; None where what it needs is not installed."""
    name = f"pairs_{file.parents[1].name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, pytest.skip.Exception):
        return None
    return module


def contracts() -> dict[str, Contract]:
    """Return plugin → its contract, of each folder of plugins/ that is here and installed."""
    found = {}
    for file in sorted(ROOT.glob("plugins/*/tests/test_contract.py")):
        module = load(file)
        for value in vars(module).values() if module else ():
            is_contract = isinstance(value, type) and issubclass(value, PluginContract)
            if is_contract and value is not PluginContract:
                found.setdefault(value.name, value)
    return found


CONTRACTS = contracts()


def test_every_plugin_has_a_contract():
    for folder in ROOT.glob("plugins/*/pyproject.toml"):
        assert (folder.parent / "tests" / "test_contract.py").exists(), folder.parent.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def worlds(folder: Path) -> dict[str, dict[str, Any]]:
    """What each plugin's runs need, written once."""
    made: dict[str, dict[str, Any]] = {}
    return made


def keys_of(contract: Contract, folder: Path, worlds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if contract.name not in worlds:
        own = folder / contract.name
        own.mkdir(exist_ok=True)  # where a world skips, it is asked again
        worlds[contract.name] = dict(contract.world(own))
    return {**contract.core, **contract.settings, **worlds[contract.name]}


def conflict(first: Contract, second: Contract) -> str:
    """Return the name or role over which the two cannot share a run, or an empty string."""
    infos = [contract.plugin.info for contract in (first, second)]  # type: ignore[attr-defined]
    for mine, theirs, name in ((*infos, second.name), (*infos[::-1], first.name)):
        if named := {name, *theirs.provides} & set(mine.conflicts):
            return sorted(named)[0]
    roles = set(infos[0].provides) & set(infos[1].provides)
    return sorted(roles)[0] if roles else ""


def companions(first: Contract, second: Contract) -> dict[str, Any]:
    """Return what either needs beside it, but for those whose role the other one of the pair has."""
    taken = {role for each in (first, second) for role in each.plugin.info.provides}  # type: ignore[attr-defined]
    others = {**first.others, **second.others}
    return {name: other for name, other in others.items() if not taken & set(other.info.provides)}


@pytest.mark.parametrize(("one", "two"), list(combinations(CONTRACTS, 2)))
def test_a_pair_trains_or_is_a_declared_conflict(
    folder: Path, worlds: dict[str, dict[str, Any]], one: str, two: str
):
    first, second = CONTRACTS[one], CONTRACTS[two]
    keys = {**keys_of(first, folder, worlds), **keys_of(second, folder, worlds)}
    plugins = {**companions(first, second), one: first.plugin, two: second.plugin}
    keys["max_train_steps"] = STEPS
    gone = {*first.others, *second.others} - set(plugins)
    left_out = [(first.others | second.others)[name].info.settings for name in gone]
    owned = {key for model in left_out if model is not None for key in model.model_fields}
    keys = {key: value for key, value in keys.items() if key not in owned}
    if any("model" in plugin.info.provides for plugin in plugins.values()):  # type: ignore[attr-defined]
        keys = {k: v for k, v in keys.items() if not k.startswith("tiny_")}
        keys.pop("peft_lora_target_modules", None)  # names of the tiny model's layers
    done = attempt(folder, plugins=plugins, settings=keys, output=f"{one}-{two}")
    if role := conflict(first, second):
        assert isinstance(done.error, (ConfigError, PluginError)), done.error
        assert one in str(done.error)
        assert two in str(done.error)
        assert role in str(done.error)
        return
    if done.error is not None:
        raise done.error
    assert [event["step"] for event in done.steps] == list(range(1, STEPS + 1))
    assert {one, two} <= set(done.host.plugins if done.host else ())
