"""Wrong settings: each exits 2 and says where, which key, what value, and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.sandbox import ENTRY, make, make_clips
from faults.wrong import CHOICES, DATA, NO_VALUE, RANGES, ROWS, TYPES, UNKNOWN


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def box(tmp_path, clips, capsys, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "clips").symlink_to(clips)
    return make(tmp_path / "work", tmp_path / "site", capsys, monkeypatch)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_a_wrong_setting_is_refused_with_the_way_out(row, box, monkeypatch):
    box.write(row.config, row.entries, **row.entry)
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    if row.prepare is not None:
        row.prepare(box)
    answer = box.check(*row.args)
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    wanted = [row.key, *row.words, *([row.where] if row.where else [])]
    if row.value is not NO_VALUE and row.value is not None:
        wanted.append(repr(row.value))
    best = max(answer.problems, key=lambda line: sum(word in line for word in wanted))
    assert [word for word in wanted if word not in best] == [], answer.err


def test_all_problems_of_a_run_are_told_at_once(box, monkeypatch):
    wrong = [*TYPES, *RANGES[:6], *CHOICES[1:6], *UNKNOWN[:2]]
    config: dict[str, Any] = {}
    for row in wrong:
        config = {**row.config, **config}
    box.write(config)
    monkeypatch.setenv("TRAINER_LOG_STEP_INTERVAL", "0")
    answer = box.check("--lr_power", "0", "stray")
    assert answer.code == 2
    assert answer.out == ""
    told = {line.split(":")[1].split("=")[0].strip() for line in answer.problems}
    assert told == {*config, "log_step_interval", "lr_power", "stray"}
    assert len(answer.problems) == len(told)
    assert answer.err.startswith(f"{len(told)} problems in the settings:")


def test_all_problems_of_a_data_file_are_told_at_once(box):
    rows = [row for row in DATA if row.entry and "cannot be read" not in row.words]
    rows = [row for row in rows if "no enabled entry" not in row.words and row.where]
    entries = []
    for number, row in enumerate(rows):
        made = {**ENTRY, "id": f"e{number}", **row.entry}
        entries.append({key: value for key, value in made.items() if value is not None})
    box.write(entries=entries)
    answer = box.check()
    assert answer.code == 2
    for row in rows:
        assert any(all(word in line for word in row.words) for line in answer.problems), row.name
    silent = [
        row.name
        for number, row in enumerate(rows)
        if "id" not in row.entry and not any(f"entry 'e{number}'" in p for p in answer.problems)
    ]
    assert silent == []
    assert len(rows) >= 30


REAL = ("text for a whole number", "a near miss of a key", "cut off", "a near miss of an entry")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in REAL], ids=lambda row: row.name.replace(" ", "-")
)
def test_the_real_command_refuses_it_too(row, box):
    box.write(row.config, row.entries, **row.entry)
    if row.prepare is not None:
        row.prepare(box)
    command = [str(Path(sys.executable).with_name("trainer")), "check", "--config", "c.json"]
    path = os.pathsep.join([str(box.installed.site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    for word in (row.key, *row.words):
        assert word in done.stderr
