"""The commands of the README and of the LoRA tutorial run as they stand there.

What a model of 1.3 billion parameters would need is replaced, each replacement listed below: the
checkpoint by the tiny one, large frames and long clips by small ones. Steps are cut by words appended
to ``trainer run``. Nothing is installed; ``pip`` and ``venv`` lines are compared with the Makefile's.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

pytest.importorskip("trainer_umt5")
pytest.importorskip("trainer_lora")
judge = pytest.importorskip("trainer_wan.tiny.judge")

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = (
    "--max_train_steps", "2", "--lr_warmup_steps", "0", "--validation_num_inference_steps", "2",
    "--validation_resolution", "32x32", "--validation_num_video_frames", "5",
)  # fmt: skip
MODEL_IDS = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",)


def fenced(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for language, block in FENCE.findall(text) if language in languages]


def run(line: str, folder: Path) -> None:
    """Run a line of a shell block with the programs of this environment."""
    words = shlex.split(line, comments=True)
    program, words = Path(words[0]).name, words[1:]
    if program == "trainer":
        words = ["-m", "trainer_core", *words, *(SHORT if words[0] == "run" else ())]
    else:
        assert program == "python", line
    if words[1] == "trainer_wan.testing" and words[2] == "judge":
        words += ["--n", "1"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_readmes_commands_without_make_train_and_judge(tmp_path: Path):
    pytest.importorskip("trainer_tensorboard")  # the demo's config reports to it
    for name in ("config", "plugins"):
        (tmp_path / name).symlink_to(ROOT / name)
    (block,) = (b for b in fenced("README.md", "sh") if "venv" in b)
    lines = [line for line in block.splitlines() if "venv " not in line and "pip" not in line]
    assert len(lines) == 5
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "output/demo" / judge.PICTURE).is_file()
    assert (tmp_path / "output/demo" / judge.LORA).is_file()


def test_the_readmes_commands_are_those_of_make(tmp_path: Path):
    (block,) = (b for b in fenced("README.md", "sh") if "venv" in b)
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = [
        line for line in done.stdout.splitlines() if re.match(r"\.venv/bin/(python|trainer)", line)
    ]
    install, *rest = made
    assert [
        line for line in block.splitlines() if "pip" not in line and "venv " not in line
    ] == rest
    (pip,) = (line for line in block.splitlines() if "pip" in line)
    told, named = (set(re.findall(r"-e (?:\./)?([\w./-]+)", line)) for line in (pip, install))
    here = {"plugins/" + path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    assert named == {"."} | here
    assert {name for name in told if name == "." or (ROOT / name).is_dir()} == named


def test_the_lora_tutorial_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = "docs/tutorials/first-lora.md"
    data, config = fenced(page, "json")
    data = data.replace('"resolution": 632', '"resolution": 32').replace("49", "9")
    config = re.sub(r'("model_flavour": "[\w.-]+",)', r'\1 "mixed_precision": "no",', config)
    config = config.replace("{", f'{{"pretrained_model_name_or_path": "{judge.CHECKPOINT}",', 1)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/my-data.json").write_text(data)
    (tmp_path / "config/my-lora.json").write_text(config)
    run(
        "python -m trainer_core.testing clips datasets/my-clips --n 2 --frames 9 --fps 16", tmp_path
    )
    for block in fenced(page, "sh"):
        for line in block.splitlines():
            run(line, tmp_path)
    (code,) = fenced(page, "python")
    for name in MODEL_IDS:
        assert name in code
        code = code.replace(name, str(judge.CHECKPOINT))
    code = code.replace("torch.bfloat16", "torch.float32")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
