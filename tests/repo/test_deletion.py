"""Each folder of plugins/ can be deleted: everything else is still found, and passes.

The tree is copied without the folder, and Python is told that the package was never installed: its
module cannot be imported and its distribution is not listed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
LEFT_OUT = (".git", ".venv", "venv", "output", "cache", "datasets", "models", "*.egg-info")
CACHES = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "build")

# Python runs a module of this name at its start, in child processes too.
NOT_INSTALLED = """
import importlib.abc
import importlib.metadata as metadata
import importlib.util
import sys

DELETED = {deleted!r}


class Deleted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in [f"trainer_{{d.replace('-', '_')}}" for d in DELETED]:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def spec_of(name, package=None):
    try:
        return any_spec(name, package)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None  # as for a package that was never installed
        raise


def installed(**arguments):
    names = [f"trainer-{{name.replace('_', '-')}}" for name in DELETED]
    found = all_distributions(**arguments)
    return (each for each in found if each.metadata["Name"].replace("_", "-") not in names)


sys.meta_path.insert(0, Deleted())
all_distributions, metadata.distributions = metadata.distributions, installed
any_spec, importlib.util.find_spec = importlib.util.find_spec, spec_of
"""


def without(names: list[str], folder: Path) -> dict[str, str]:
    """Copy the tree to ``folder`` without these plugins; return the environment to use it in."""
    ignored = shutil.ignore_patterns(*LEFT_OUT, *CACHES)
    for item in ROOT.iterdir():
        if item.name in ignored(str(ROOT), [item.name]):
            continue
        if item.is_dir():
            shutil.copytree(item, folder / item.name, ignore=shutil.ignore_patterns(*CACHES))
        else:
            shutil.copy(item, folder / item.name)
    for name in names:
        shutil.rmtree(folder / "plugins" / name)
    start = folder / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(NOT_INSTALLED.format(deleted=names))
    left = [str(path.parent) for path in sorted(folder.glob("plugins/*/pyproject.toml"))]
    paths = [str(start), str(folder / "core"), *left]
    return {**environment(), "PYTHONPATH": os.pathsep.join(paths)}


def run_tests(names: list[str], folder: Path, *words: str) -> str:
    """Run pytest in the copy; fail unless it passes. Returns what it printed."""
    env = without(names, folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    command += ["--ignore", "tests/repo/test_deletion.py"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", PLUGINS)
def test_without_a_plugin_everything_else_is_found(name: str, tmp_path: Path):
    printed = run_tests([name], tmp_path, "--collect-only")
    files = set(re.findall(r"^([\w/-]+\.py)::", printed, re.MULTILINE))
    owners = {file.split("/")[1] for file in files if file.startswith("plugins/")}
    assert owners == set(PLUGINS) - {name}
    assert "tests/core/test_loop.py" in files


def test_the_copy_has_no_trace_of_a_deleted_plugin(tmp_path: Path):
    """The deletion is real: neither import nor entry point is left, and core comes from the copy."""
    if not PLUGINS:
        pytest.skip("no plugin is here")
    name = PLUGINS[0]
    code = (
        "from trainer_core.catalogue import Catalogue; import trainer_core; "
        "from importlib.util import find_spec\n"
        f"assert find_spec('trainer_{name}') is None\n"
        f"try: import trainer_{name}; print('there')\n"
        "except ModuleNotFoundError: print('gone')\n"
        "print(sorted(Catalogue.installed()), trainer_core.__file__)"
    )
    command = [sys.executable, "-c", code]
    env = without([name], tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    gone, _, rest = done.stdout.partition("\n")
    assert gone == "gone"
    assert f"'{name}'" not in rest
    assert all(f"'{other}'" in rest for other in PLUGINS[1:])
    assert str(tmp_path) in rest


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_without_a_plugin_everything_else_passes(name: str, tmp_path: Path):
    run_tests([name], tmp_path, "-m", "not slow and not gpu")


@pytest.mark.slow
def test_core_passes_without_any_plugin(tmp_path: Path):
    run_tests(PLUGINS, tmp_path, "-m", "not slow and not gpu")
