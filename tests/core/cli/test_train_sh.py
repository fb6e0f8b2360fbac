"""``./train.sh`` is ``trainer run`` under the name that the quick start's users know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_script_hands_every_argument_on(tmp_path: Path):
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    words = ["--config", str(tmp_path / "no such file.json"), "--plugins", ""]

    def told(*command: str) -> tuple[int, str, str]:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    found = told(str(ROOT / "train.sh"), *words)
    assert found == told("trainer", "run", *words)
    assert found[0] == 2
    assert "no such file.json" in found[1] + found[2]
