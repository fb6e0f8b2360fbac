"""Who may import whom: core no plugin, plugins only core, each other never."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if (p / "pyproject.toml").exists())


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def packages(folder: Path) -> list[Path]:
    return sorted(folder.glob("trainer_*/**/*.py"))


def test_core_imports_no_plugin():
    names = {f"trainer_{plugin.name}" for plugin in PLUGINS}
    for path in (ROOT / "core").rglob("*.py"):
        assert not names & {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_imports_no_other(plugin: Path):
    others = {f"trainer_{other.name}" for other in PLUGINS if other != plugin}
    assert packages(plugin)
    for path in packages(plugin):
        assert not others & {name.split(".")[0] for name in imported(path)}, path


def test_core_names_no_plugin_in_its_code():
    """Core must not branch on a plugin's name; pending.json may tell of features."""
    names = {plugin.name for plugin in PLUGINS}
    for path in (ROOT / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "model_type" not in ast.dump(node):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not names & {w for w in words if isinstance(w, str)}, (path, node.lineno)


def test_folders_of_the_tree_are_not_import_packages():
    for name in ("core", "plugins", "config", "docs", "tests"):
        assert not (ROOT / name / "__init__.py").exists()


def test_every_hook_call_of_core_is_marked():
    names = hook_names()
    found = 0
    for path in (ROOT / "core/trainer_core").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if any(f"hooks.{name}(" in line for name in names):
                found += 1
                assert "# HOOK" in line, f"{path}:{number}"
    assert found >= 8


def hook_names() -> set[str]:
    tree = ast.parse((ROOT / "core/trainer_core/hookspecs.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_hook_is_called_by_core():
    text = "\n".join(p.read_text() for p in (ROOT / "core/trainer_core").rglob("*.py"))
    for name in hook_names():
        called = f"hooks.{name}(" in text or f'calls("{name}")' in text
        assert called, f"nothing calls the hook {name}"
