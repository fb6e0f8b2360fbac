"""What may not change before a resume is refused by name, and the run then still goes on to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import ConfigError, PluginInfo, hookimpl
from trainer_core import checkpoint as checkpoints
from trainer_core.errors import CheckpointError
from trainer_core.testing.clips import write_clips
from trainer_core.testing.harness import FPS, FRAMES, SIZE, Finished, Interrupted, attempt, train
from trainer_core.types import LossTerm

SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "use_ema": True, "tiny_layers": 2}
WAYS_OUT = ("Make them equal again", "--output_dir", "--resume_from_checkpoint none")


class Plain:
    """Adds a loss term of zeros."""

    info = PluginInfo(summary="adds nothing")

    def __init__(self, settings: None = None) -> None:
        pass

    @hookimpl
    def compute_loss(self, batch):
        return LossTerm("extra", torch.zeros(len(batch.sample_ids)))


class WithState(Plain):
    """A later version of it, that counts."""

    def __init__(self, settings: None = None) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules")


@pytest.fixture(scope="module")
def unharmed(folder: Path) -> Finished:
    return train(folder, plugins={"extra": Plain}, settings=SETTINGS, output="unharmed")


@pytest.fixture
def begun(folder: Path, unharmed: Finished, request: pytest.FixtureRequest) -> str:
    """The name of a run with the plugin that ended in step 3, after checkpoint-2."""
    name = request.node.name
    with pytest.raises(Interrupted):
        train(folder, plugins={"extra": Plain}, settings=SETTINGS, output=name, crash_at=3)
    return name


def resume(folder: Path, name: str, plugin: type | None = Plain, **changes: Any) -> Finished:
    plugins = {"extra": plugin} if plugin else {}
    return attempt(folder, plugins=plugins, settings={**SETTINGS, **changes}, output=name)


def goes_on(folder: Path, name: str, unharmed: Finished) -> None:
    """The same command as at first ends with the bits of a run that was never disturbed."""
    assert checkpoints.inspect(folder / name / "checkpoint-2") is None
    assert not list((folder / name).glob("earlier-run-*"))
    done = resume(folder, name)
    assert done.error is None, done.error
    assert any("Going on from" in line and "checkpoint-2" in line for line in done.said)
    assert done.weights() == unharmed.weights()
    assert done.events == unharmed.events


CHANGES = {
    "train_batch_size": (2, 1),
    "gradient_accumulation_steps": (2, 1),
    "learning_rate": (0.001, 0.002),
    "seed": (7, 8),
    "use_ema": (True, False),
    "tiny_layers": (2, 3),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_setting_is_refused(folder: Path, begun: str, unharmed: Finished, key: str):
    was, now = CHANGES[key]
    done = resume(folder, begun, **{key: now})
    assert isinstance(done.error, CheckpointError), done.error
    assert f"{key}: {was!r} in the checkpoint, {now!r} now" in str(done.error)
    assert all(way in str(done.error) for way in WAYS_OUT)
    assert done.draws == ()
    goes_on(folder, begun, unharmed)


def test_all_changes_are_told_at_once(folder: Path, begun: str):
    done = resume(folder, begun, **{key: now for key, (_, now) in CHANGES.items()})
    assert all(f"  {key}: " in str(done.error) for key in CHANGES)


def test_a_plugin_that_is_no_longer_named_is_refused(folder: Path, begun: str, unharmed: Finished):
    done = resume(folder, begun, None)
    assert isinstance(done.error, CheckpointError), done.error
    assert "plugin extra: in the checkpoint, not in this run" in str(done.error)
    assert all(way in str(done.error) for way in WAYS_OUT)
    goes_on(folder, begun, unharmed)


def test_a_plugin_that_is_no_longer_installed_is_refused(folder: Path, begun: str, unharmed):
    done = resume(folder, begun, None, plugins=["extra", "tiny"])
    assert isinstance(done.error, ConfigError), done.error
    assert "extra" in str(done.error)
    assert done.draws == ()
    goes_on(folder, begun, unharmed)


def test_a_new_plugin_is_refused(folder: Path, begun: str, unharmed: Finished):
    more = {"extra": Plain, "another": type("Another", (Plain,), {"compute_loss": None})}
    done = attempt(folder, plugins=more, settings=SETTINGS, output=begun)
    assert isinstance(done.error, CheckpointError), done.error
    assert "plugin another: in this run, not in the checkpoint" in str(done.error)
    goes_on(folder, begun, unharmed)


def test_a_plugin_whose_new_version_has_a_state_is_refused(folder: Path, begun: str, unharmed):
    done = resume(folder, begun, WithState)
    assert isinstance(done.error, CheckpointError), done.error
    assert "holds no state of plugin 'extra'" in str(done.error)
    assert "--resume_from_checkpoint none" in str(done.error)
    assert done.draws == ()
    goes_on(folder, begun, unharmed)


def test_another_clip_is_refused_until_it_is_gone_again(folder: Path, begun: str, unharmed):
    clips = folder / "video-4"
    write_clips(clips / "new", n=1, seed=99, sizes=[SIZE], frames=FRAMES, fps=FPS)
    try:
        done = resume(folder, begun)
        assert isinstance(done.error, CheckpointError), done.error
        assert "data: other files, captions or clip plans" in str(done.error)
        assert all(way in str(done.error) for way in WAYS_OUT)
    finally:
        for path in (clips / "new").iterdir():
            path.unlink()
        (clips / "new").rmdir()
    goes_on(folder, begun, unharmed)


def test_another_caption_is_refused(folder: Path, begun: str, unharmed: Finished):
    caption = next(iter(sorted((folder / "video-4").glob("*.txt"))))
    before = caption.read_text()
    caption.write_text("something else\n")
    try:
        assert "captions" in str(resume(folder, begun).error)
    finally:
        caption.write_text(before)
    goes_on(folder, begun, unharmed)


def test_what_may_change_may_change(folder: Path, begun: str, unharmed: Finished):
    done = resume(folder, begun, checkpoints_total_limit=1, checkpoint_step_interval=1)
    assert done.error is None, done.error
    assert checkpoints.steps(folder / begun) == [4]
    assert done.weights() == unharmed.weights()
    assert done.steps == unharmed.steps


def test_a_fresh_start_is_a_way_out(folder: Path, begun: str):
    done = resume(folder, begun, learning_rate=0.002, resume_from_checkpoint="none")
    assert done.error is None, done.error
    assert (folder / begun / "earlier-run-1" / "checkpoint-2").is_dir()
    assert {draw.step for draw in done.draws} == {1, 2, 3, 4}
