"""Checkpoints: whole or absent, checked byte by byte, restored bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer_core import CheckpointError, ConfigError
from trainer_core import checkpoint as checkpoints


def write(folder: Path, step: int, text: str = "hello") -> Path:
    def fill(work: Path) -> None:
        (work / "sub").mkdir()
        (work / "sub" / "data.txt").write_text(text)

    return checkpoints.write(folder, step=step, state={"x": 1}, fill=fill)


def test_round_trip(tmp_path: Path):
    folder = write(tmp_path, 7)
    found = checkpoints.read(folder)
    assert (found.step, found.state["x"]) == (7, 1)
    assert not list(tmp_path.glob(".*"))


def test_a_failing_writer_leaves_nothing_and_keeps_the_one_before(tmp_path: Path):
    write(tmp_path, 1)

    def full(work: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are untouched"):
        checkpoints.write(tmp_path, step=2, state={}, fill=full)
    assert checkpoints.steps(tmp_path) == [1]
    assert checkpoints.inspect(tmp_path / "checkpoint-1") is None


def damage_flip(folder: Path) -> None:
    path = folder / "sub" / "data.txt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def damage_cut(folder: Path) -> None:
    path = folder / "sub" / "data.txt"
    path.write_bytes(path.read_bytes()[:-1])


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["sub/data.txt"]["bytes"] += 1
    path.write_text(json.dumps(manifest))


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_garbage(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


DAMAGES = [
    (damage_flip, "data.txt was changed"),
    (damage_cut, "bytes instead of"),
    (damage_missing, "state.json is missing"),
    (damage_manifest, "manifest.json was changed"),
    (damage_no_manifest, "cannot be read"),
    (damage_garbage, "cannot be read"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES)
def test_damage_is_named_and_latest_falls_back(tmp_path: Path, damage, text: str):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=text):
        checkpoints.read(tmp_path / "checkpoint-2")
    said: list[str] = []
    found = checkpoints.find(tmp_path, "latest", say=said.append)
    assert found is not None
    assert found.step == 1
    assert text in said[0]


def test_all_damaged_is_an_error_not_a_silent_fresh_start(tmp_path: Path):
    damage_cut(write(tmp_path, 1))
    with pytest.raises(CheckpointError, match="resume_from_checkpoint none"):
        checkpoints.find(tmp_path, "latest", say=lambda _: None)


def test_find_by_path_by_name_none_and_unknown(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    for resume in (str(tmp_path / "checkpoint-1"), "checkpoint-1"):
        found = checkpoints.find(tmp_path, resume, say=print)
        assert found is not None
        assert found.step == 1
    assert checkpoints.find(tmp_path, "none", say=print) is None
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        checkpoints.find(tmp_path, "nowhere", say=print)


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [1, 2, 10]), (2, [2, 10]), (1, [10]), (5, [1, 2, 10])]
)
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]):
    for step in (10, 2, 1):
        write(tmp_path, step)
    (tmp_path / ".checkpoint-3.writing").mkdir()
    checkpoints.prune(tmp_path, keep=keep)
    assert checkpoints.steps(tmp_path) == left
    assert not (tmp_path / ".checkpoint-3.writing").exists()


@pytest.mark.parametrize("name", ["AdamW", "optimi.Lion", "optimi.AdamW"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str):
    import optimi

    made = {"AdamW": torch.optim.AdamW, "optimi.Lion": optimi.Lion, "optimi.AdamW": optimi.AdamW}

    def start() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        dtype = torch.bfloat16 if name == "optimi.AdamW" else torch.float32
        parameter = nn.Parameter(torch.linspace(-1, 1, 8).to(dtype))
        return parameter, made[name]([parameter], lr=0.01)

    def go(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            (parameter.float() ** 3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    through, optimizer = start()
    go(through, optimizer, 5)
    saved = through.detach().clone()
    folder = checkpoints.write(
        tmp_path, step=5, state={}, fill=lambda work: checkpoints.save_optimizer(work, optimizer)
    )
    go(through, optimizer, 5)

    resumed, second = start()
    resumed.data.copy_(saved)
    checkpoints.load_optimizer(checkpoints.read(folder), second)
    go(resumed, second, 5)
    assert torch.equal(resumed, through)


def test_a_plugins_state_holds_tensors_and_plain_values(tmp_path: Path):
    state = {"latch": True, "ema": 0.25, "w": torch.arange(3.0)}
    folder = checkpoints.write(
        tmp_path, step=1, state={}, fill=lambda work: checkpoints.save_plugin(work, "crepa", state)
    )
    back = checkpoints.load_plugin(checkpoints.read(folder), "crepa")
    assert (back["latch"], back["ema"]) == (True, 0.25)
    assert torch.equal(back["w"], state["w"])


def test_another_run_is_refused_with_all_differences_and_two_ways_out(tmp_path: Path):
    state = {"settings": {"seed": 1, "lora_rank": 16}, "plugins": {"wan": "1"}, "data": "d"}
    folder = checkpoints.write(tmp_path, step=1, state=state, fill=lambda work: None)
    found = checkpoints.read(folder)
    same = {"settings": state["settings"], "plugins": {"wan": "2"}, "data": "d"}
    checkpoints.check_same_run(found, **same)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.check_same_run(
            found,
            settings={"seed": 2, "lora_rank": 16},
            plugins={"wan": "1", "tread": "1"},
            data="e",
        )
    text = str(caught.value)
    for part in (
        "seed: 1 in the checkpoint, 2 now",
        "plugin tread",
        "data:",
        "--output_dir",
        "none",
    ):
        assert part in text
    assert "lora_rank" not in text
