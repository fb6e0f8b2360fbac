"""What a run leaves: samples, checkpoints, lengths, and what it does about failures on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core import PluginInfo, TrainerError, hookimpl
from trainer_core.session import only_one
from trainer_core.testing.contract import PluginContract
from trainer_core.testing.harness import Finished, Interrupted, attempt, train

SAMPLES = {"validation_prompt": "a red circle", "validation_step_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def events(done: Finished, kind: str) -> list[dict[str, Any]]:
    return [event for event in done.events if event["kind"] == kind]


def checkpoints(done: Finished) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in done.folder.glob("checkpoint-*"))


class Failing:
    """Fails to render from ``step`` on."""

    info = PluginInfo(summary="fails to render")
    step = 1

    def __init__(self, settings: None = None) -> None:
        self.told: list[str] = []

    @hookimpl
    def validate(self, run):
        if run.moment.step >= self.step:
            raise RuntimeError("no room to decode")
        return []


class FailingAtOnce(Failing):
    step = 0


def test_a_failed_validation_is_said_and_training_goes_on(folder: Path):
    plain = train(folder, plugins={}, output="plain")
    done = train(folder, plugins={"failing": Failing}, settings=SAMPLES, output="failing")
    assert [event["step"] for event in events(done, "validation")] == [0]
    assert [event["step"] for event in events(done, "validation_failed")] == [2, 4]
    assert any("validation of step 2 failed" in line for line in done.said)
    assert any("RuntimeError: no room to decode" in line for line in done.said)
    assert done.steps == plain.steps
    assert done.weights() == plain.weights()


def test_a_failure_before_step_1_ends_the_run(folder: Path):
    plugins = {"failing": FailingAtOnce}
    done = attempt(folder, plugins=plugins, settings=SAMPLES, output="at-once")
    assert isinstance(done.error, RuntimeError)
    assert done.draws == ()
    assert any("in plugin 'failing', hook validate" in n for n in done.error.__notes__)


class Tracker:
    info = PluginInfo(summary="a tracker")

    def __init__(self, settings: None = None) -> None:
        self.records: list[Any] = []

    @hookimpl
    def track(self, record):
        self.records.append(record)


class BrokenTracker(Tracker):
    @hookimpl
    def track(self, record):
        super().track(record)
        if record.step == 2:
            raise OSError("the network is gone")


def test_a_failing_tracker_is_off_and_another_one_goes_on(folder: Path):
    plugins = {"broken": BrokenTracker, "fine": Tracker}
    done = train(folder, plugins=plugins, output="trackers")
    assert [line for line in done.said if "tracker broken failed at scalars of step 2" in line]
    assert done.plugin("broken").records[-1].step == 2
    kinds = [record.kind for record in done.plugin("fine").records]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    losses = [r.scalars["loss"] for r in done.plugin("fine").records if "loss" in r.scalars]
    assert losses == [event["loss"] for event in done.steps]
    assert done.steps == train(folder, plugins={}, output="untracked").steps


@pytest.mark.parametrize(("disabled", "steps"), [(False, [0, 2, 4]), (True, [2, 4])])
def test_disable_benchmark_leaves_the_untrained_model_out(folder: Path, disabled: bool, steps):
    keys = {**SAMPLES, "disable_benchmark": disabled}
    done = train(folder, plugins={}, settings=keys, output=f"benchmark-{disabled}")
    assert [event["step"] for event in events(done, "validation")] == steps
    folders = sorted(path.name for path in (done.folder / "validation").iterdir())
    assert folders == [f"step-{step:08d}" for step in steps]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", ["validation"]),
        ("ema_only", ["validation-ema"]),
        ("comparison", ["validation", "validation-ema"]),
    ],
)
def test_ema_validation_chooses_the_weights_that_are_rendered(folder: Path, choice: str, names):
    keys = {**SAMPLES, "use_ema": True, "ema_validation": choice, "max_train_steps": 2}
    done = train(folder, plugins={}, settings=keys, output=f"ema-{choice}")
    untrained, trained = events(done, "validation")
    assert untrained["files"] == ["contact_sheet", "validation"]
    assert [name for name in trained["files"] if name != "contact_sheet"] == names
    live, averaged = done.weights().values()
    assert live != averaged


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"max_train_steps": 0, "num_train_epochs": 2}, 4),  # 4 clips in batches of 2
        ({"max_train_steps": 0, "num_train_epochs": 2, "train_batch_size": 1}, 8),
        ({"max_train_steps": 3, "num_train_epochs": 1}, 2),
        ({"max_train_steps": 3, "num_train_epochs": 1, "ignore_final_epochs": True}, 3),
        ({"max_train_steps": 3}, 3),
    ],
)
def test_the_length_of_a_run(folder: Path, request: pytest.FixtureRequest, keys, steps: int):
    output = f"length-{request.node.callspec.id}"
    done = train(folder, plugins={}, settings=keys, output=output)
    assert [event["step"] for event in done.steps] == list(range(1, steps + 1))


@pytest.mark.parametrize(("limit", "kept"), [(2, [3, 4]), (0, [1, 2, 3, 4]), (1, [4])])
def test_the_newest_checkpoints_are_kept(folder: Path, limit: int, kept: list[int]):
    keys = {"checkpoint_step_interval": 1, "checkpoints_total_limit": limit}
    done = train(folder, plugins={}, settings=keys, output=f"limit-{limit}")
    assert checkpoints(done) == kept


def test_without_an_interval_there_is_one_checkpoint_at_the_end(folder: Path):
    done = train(folder, plugins={}, settings={"checkpoint_step_interval": 0}, output="no-interval")
    assert checkpoints(done) == [4]


def test_a_fresh_start_moves_the_earlier_run_aside(folder: Path):
    earlier = train(folder, plugins={}, output="used")
    log = earlier.events
    keys = {"resume_from_checkpoint": "none", "max_train_steps": 2, "seed": 9}
    fresh = train(folder, plugins={}, settings=keys, output="used")
    aside = fresh.folder / "earlier-run-1"
    assert checkpoints(fresh) == [2]
    assert (aside / "checkpoint-4").is_dir()
    assert Finished(aside, (), ()).events == log
    assert len(fresh.steps) == 2
    assert any("earlier-run-1" in line for line in fresh.said)


def test_a_second_run_in_a_folder_at_work_is_refused(folder: Path):
    with only_one(folder / "busy"):
        refused = attempt(folder, plugins={}, output="busy")
    assert isinstance(refused.error, TrainerError)
    assert "another run is writing to" in str(refused.error)
    assert "--output_dir" in str(refused.error)
    train(folder, plugins={}, settings={"max_train_steps": 1}, output="busy")


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_an_interrupted_run_leaves_what_an_uninterrupted_one_leaves(folder: Path, crash_at: int):
    keys = {**SAMPLES, "use_ema": True, "gradient_accumulation_steps": 2}
    keys |= {"eval_steps_interval": 1, "checkpoint_step_interval": 1}
    through = train(folder, plugins={}, settings=keys, output="through", num_held_out=1)
    output = f"cut-{crash_at}"
    with pytest.raises(Interrupted):
        train(folder, plugins={}, settings=keys, output=output, num_held_out=1, crash_at=crash_at)
    resumed = train(folder, plugins={}, settings=keys, output=output, num_held_out=1)
    PluginContract.assert_equal(resumed, through)
    assert {draw.step for draw in resumed.draws} == set(range(crash_at, 5))
    frames = "validation/step-00000004/validation.mp4"
    assert (resumed.folder / frames).read_bytes() == (through.folder / frames).read_bytes()


def test_the_held_out_loss_is_said_before_and_after(folder: Path):
    keys = {"learning_rate": 0.05}
    done = train(folder, plugins={}, settings=keys, output="held-out", num_held_out=1)
    first, last = (event["eval/eval"] for event in events(done, "eval"))
    wanted = f"held-out loss {first:.4f} before, {last:.4f} after (eval)"
    assert first != last
    assert [line for line in done.said if wanted in line or wanted[:-5] in line]
