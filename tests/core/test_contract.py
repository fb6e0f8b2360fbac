"""The shipped contract finds plugins that break it, and the tutorial's plugin keeps it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support import environment

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorials" / "first-plugin.md"

HEAD = """
from trainer_core import LossTerm, PluginInfo, PluginSettings, hookimpl, key
from trainer_core.testing.contract import PluginContract

class Settings(PluginSettings):
    bad_weight: float = key(1.0, "Weight.")

class Bad:
    info = PluginInfo(summary="Breaks a rule", settings=Settings)
    def __init__(self, settings):
        self.settings = settings
        self.count = 0
"""
TAIL = """
class TestBad(PluginContract):
    name = "bad"
    plugin = Bad
    settings = {"bad_weight": 0.5}
"""
BROKEN = {
    "it_draws_nothing_from_global_generators": """
    @hookimpl
    def compute_loss(self, output):
        import torch
        return LossTerm("bad", torch.rand(output.prediction.shape[0]))
""",
    "two_runs_are_equal_bit_for_bit": """
    @hookimpl
    def compute_loss(self, output):
        import os
        n = output.prediction.shape[0]
        return LossTerm("bad", output.prediction.new_full((n,), os.urandom(1)[0] / 256.0))
""",
    "an_interrupted_run_ends_with_the_same_bits": """
    @hookimpl
    def compute_loss(self, output):
        self.count += 1
        n = output.prediction.shape[0]
        return LossTerm("bad", output.prediction.flatten(1).mean(1) * self.count)
""",
    "samples_change_nothing_in_training": """
    @hookimpl
    def validate(self, run):
        import torch
        with torch.no_grad():
            next(iter(run.model.modules["transformer"].parameters())).add_(0.1)
        return []
""",
    "without_it_every_other_draw_stays": """
    def attach(self, run):
        object.__setattr__(run.settings, "seed", 8)
""",
    "its_state_comes_back": """
    @hookimpl
    def compute_loss(self, output):
        self.count += 1
    def state_dict(self):
        return {"count": self.count}
    def load_state_dict(self, state):
        pass
""",
}


def contract(folder: Path, *nodes: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)


def test_the_plugin_of_the_tutorial_keeps_the_contract(tmp_path: Path):
    text = TUTORIAL.read_text(encoding="utf-8")
    found = re.findall(
        r"`([\w/]+\.py)`[^\n]*(?:\n(?!```)[^\n]*)*\n```python\n(.*?)```", text, re.DOTALL
    )
    assert [name for name, _ in found] == [
        "trainer_mean_match/__init__.py",
        "trainer_mean_match/hooks.py",
        "tests/test_mean_match.py",
    ]
    for name, code in found:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    done = contract(tmp_path, "tests/test_mean_match.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d passed", done.stdout), done.stdout


def test_broken_plugins_fail_the_test_of_their_rule(tmp_path: Path):
    rules = {**BROKEN, "importing_it_imports_nothing_heavy": ""}
    nodes = []
    for rule, body in rules.items():
        imports = "import torch" if not body else ""
        (tmp_path / f"plugin_{rule}.py").write_text(imports + HEAD + body, encoding="utf-8")
        code = f"from plugin_{rule} import Bad, PluginContract\n{TAIL}"
        (tmp_path / f"test_{rule}.py").write_text(code, encoding="utf-8")
        nodes.append(f"test_{rule}.py::TestBad::test_{rule}")
    done = contract(tmp_path, *nodes)
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert sorted(failed) == sorted(nodes), done.stdout
