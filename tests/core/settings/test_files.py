from __future__ import annotations

import pytest

from trainer_core.errors import ConfigError
from trainer_core.settings.files import read_config, read_json


@pytest.fixture
def write(tmp_path):
    def call(text: str | bytes):
        path = tmp_path / "c.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return call


def test_comments_trailing_commas_and_leading_dashes_are_read(write):
    path = write('{ // one\n "--seed": 1, /* "seed": 2 */\n "tracker-run-name": "a // b",\n}')
    assert read_config(path) == {"seed": 1, "tracker_run_name": "a // b"}


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    assert read_config(write('\ufeff{"seed": 1}')) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "seed": 1,\n  "seed": 2\n}', "line 3, column 3: 'seed' stands there twice"),
        ('{"a": {"b": 1}, "c": [{"b": 1, \n"b": 2}]}', "line 2, column 1: 'b' stands there twice"),
        ('{"seed": 1, "--seed": 2}', "'seed' stands there twice"),
        ('{"seed": }', "line 1, column 10"),
        ('{\n"seed" 1}', "line 2"),
        ("", "not valid JSON"),
        ("[1]", "holds a list; it must hold one object"),
        ("null", "holds null"),
        ('{"a": NaN}', "a is not a finite number"),
        ('{"a": [1e999]}', r"a\[0\] is not a finite number"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not usable JSON"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write(text))
    assert "c.json" in str(caught.value)


def test_equal_keys_in_different_objects_are_fine(write):
    path = write('{"a": {"id": 1}, "b": [{"id": 1}, {"id": 2}], "id": "x: {"}')
    assert read_json(path)["b"] == [{"id": 1}, {"id": 2}]


def test_missing_files_name_the_flag_and_the_default(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no such file \(--config\)"):
        read_config(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="is a folder"):
        read_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"config/config.json.*--config FILE"):
        read_config()
