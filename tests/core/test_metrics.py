"""The event log, the tracker thread and the meter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer_core import TrainerError
from trainer_core.metrics import EventLog, Meter, Trackers, check_finite
from trainer_core.types import Record


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_cut_back_to_a_size_and_grows_on_from_there(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1)
    size = log.flush()
    log.write("step", step=2)
    log.close()
    log = EventLog(tmp_path / "events.jsonl")
    log.cut(size)
    log.write("step", step=3)
    log.close()
    assert [event["step"] for event in lines(tmp_path / "events.jsonl")] == [1, 3]


def test_a_failing_tracker_is_reported_once_and_the_others_go_on():
    got, said = [], []

    def bad(record: Record) -> None:
        raise RuntimeError("no network")

    def good(record: Record) -> None:
        got.append(record.kind)

    trackers = Trackers([("bad", bad), ("good", good)], say=said.append)
    for step in (1, 2, 3):
        trackers.put(Record("scalars", step=step))
    trackers.end(3)
    assert got == ["scalars"] * 3 + ["end"]
    assert len(said) == 1
    assert "bad" in said[0]
    assert "no network" in said[0]


def test_the_meter_reads_tensors_and_numbers_by_step():
    meter = Meter()
    meter.add(1, {"loss": torch.tensor(0.5), "lr": 0.1}, ["a"])
    meter.add(2, {"loss": torch.tensor(0.25), "lr": 0.2}, ["b"])
    rows = [(row.step, row.scalars, row.sample_ids) for row in meter.read()]
    assert rows == [(1, {"loss": 0.5, "lr": 0.1}, ["a"]), (2, {"loss": 0.25, "lr": 0.2}, ["b"])]
    assert meter.read() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_step_scalar_and_samples(value: float):
    meter = Meter()
    meter.add(4, {"loss": torch.tensor(value), "lr": 0.1}, ["shapes/clip-3.mp4"])
    with pytest.raises(TrainerError, match=r"step 4: loss is not finite.*clip-3"):
        check_finite(meter.read()[0])
