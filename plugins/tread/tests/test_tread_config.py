"""What ``tread_config`` takes; every refusal names the route and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core.catalogue import Catalogue
from trainer_core.errors import ConfigError
from trainer_core.settings.load import Resolved, resolve
from trainer_core.testing.harness import attempt
from trainer_core.testing.tiny import Tiny
from trainer_tread import Tread
from trainer_tread.routing import first_conflict, overlap, resolved


def route(ratio: Any = 0.1, start: Any = 1, end: Any = 2) -> dict[str, Any]:
    return {"selection_ratio": ratio, "start_layer_idx": start, "end_layer_idx": end}


def settle(folder: Path, **keys: Any) -> Resolved:
    file = folder / "config.json"
    file.write_text(json.dumps({"model_family": "tiny", "model_type": "full", **keys}))
    catalogue = Catalogue.of({"tread": Tread, "tiny": Tiny})
    return resolve(file, environ={}, catalogue=catalogue)


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(folder, **keys)
    return str(caught.value)


def test_the_key_switches_the_plugin_on_and_other_plugin_lists_leave_it_idle(tmp_path: Path):
    config = {"routes": [route()]}
    assert "tread" in settle(tmp_path, tread_config=config).plugins
    idle = settle(tmp_path, tread_config=config, plugins=["tiny"])
    assert "tread" not in idle.plugins
    assert idle.unused == ("tread_config has no effect: tread is not in --plugins",)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tread_config": None},
        {"tread_config": {}},
        {"tread_config": {"routes": []}},
        {"tread_config": {"routes": None}},
        {"tread_config": {"routes": {"selection_ratio": 0.5}}},
        {"tread_config": {"routes": "all"}},
        {"tread_config": [route()]},
        {"tread_config": "yes"},
        {"tread_config": 3},
    ],
)
def test_tread_without_routes_is_refused_with_an_example(tmp_path: Path, keys: dict[str, Any]):
    text = refusal(tmp_path, plugins=["tread", "tiny"], **keys)
    assert "tread_config" in text
    example = text[text.index("{", text.index("example")) :]
    found, _ = json.JSONDecoder().raw_decode(example)
    settle(tmp_path, tread_config=found)  # the example is a value that works


@pytest.mark.parametrize(
    ("wrong", "place", "what"),
    [
        ({"selection_ratio": 1}, "selection_ratio", "below 1"),
        ({"selection_ratio": -0.1}, "selection_ratio", "at least 0"),
        ({"selection_ratio": "0.5"}, "selection_ratio", "number"),
        ({"selection_ratio": True}, "selection_ratio", "number"),
        ({"selection_ratio": None}, "selection_ratio", "number"),
        ({"start_layer_idx": 1.0}, "start_layer_idx", "whole number"),
        ({"start_layer_idx": "1"}, "start_layer_idx", "whole number"),
        ({"end_layer_idx": True}, "end_layer_idx", "whole number"),
        ({"end_layer_idx": ...}, "end_layer_idx", "required"),
        ({"selection_ration": 0.5}, "selection_ration", "selection_ratio"),
    ],
)
def test_a_wrong_route_is_named(tmp_path: Path, wrong: dict[str, Any], place: str, what: str):
    bad = {k: v for k, v in {**route(), **wrong}.items() if v is not ...}
    text = refusal(tmp_path, tread_config={"routes": [route(0.1, 3, 3), bad]})
    assert f"tread_config.routes[1].{place}" in text
    assert what in text
    assert "config.json" in text


def test_nan_and_unknown_keys_beside_routes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="finite"):
        Tread.info.settings(tread_config={"routes": [route(float("nan"))]})
    text = refusal(tmp_path, tread_config={"routes": [route()], "route": []})
    assert "tread_config.route: is unknown here; did you mean 'routes'?" in text.replace(
        ". D", "; d"
    )


@pytest.mark.parametrize(
    ("spans", "named"),
    [
        ([(5, 3)], ["routes[0] (blocks 5 to 3)", "ends before it starts"]),
        ([(0, 0), (-1, -2)], ["routes[1] (blocks -1 to -2)", "ends before it starts"]),
        ([(1, 3), (2, 4)], ["routes[0] (blocks 1 to 3)", "routes[1] (blocks 2 to 4)", "overlap"]),
        ([(4, 5), (0, 1), (1, 2)], ["routes[1]", "routes[2]", "overlap"]),
        ([(2, -2), (5, 8)], ["routes[0]", "routes[1]", "overlap"]),
        ([(-4, -2), (-2, -1)], ["routes[0]", "routes[1]", "overlap"]),
    ],
)
def test_what_fits_no_model_is_refused_before_anything_loads(
    tmp_path: Path, spans: list[tuple[int, int]], named: list[str]
):
    text = refusal(tmp_path, tread_config={"routes": [route(0.1, *span) for span in spans]})
    assert all(words in text for words in named)


def test_conflicts_without_a_model_are_those_at_every_number_of_blocks():
    """Against a plain search over numbers of blocks."""
    indices = range(-4, 4)
    spans = [(a, b) for a in indices for b in indices]
    for first in spans:
        for second in spans[::5]:
            fits = []
            for count in range(1, 20):
                found = [resolved(span, count) for span in (first, second)]
                fits.append(None not in found and not overlap(*found))
            assert (first_conflict([first, second]) is None) == any(fits), (first, second)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ((1, 4), "routes[0] (blocks 1 to 4) does not fit the model"),
        ((-5, 2), "routes[0] (blocks -5 to 2) does not fit the model"),
        ((3, -2), "routes[0] (blocks 3 to -2) does not fit the model"),
    ],
)
def test_the_number_of_blocks_decides_before_anything_is_encoded(
    tmp_path: Path, span: tuple[int, int], words: str
):
    keys = {"tread_config": {"routes": [route(0.1, *span)]}, "tiny_layers": 4}
    refused = attempt(tmp_path, plugins={"tread": Tread}, settings=keys)
    assert isinstance(refused.error, ConfigError)
    assert words in str(refused.error)
    assert "which has 4 blocks" in str(refused.error)
    assert "output.json" in str(refused.error), "where the key stands"
    assert not (tmp_path / "cache").exists()


def test_routes_that_meet_only_in_this_model_are_refused_naming_both(tmp_path: Path):
    config = {"routes": [route(0.1, 1, -3), route(0.2, 3, 4)]}
    plugins = {"tread": Tread}
    refused = attempt(
        tmp_path, plugins=plugins, settings={"tread_config": config, "tiny_layers": 6}
    )
    text = str(refused.error)
    assert "routes[0] (blocks 1 to -3) and routes[1] (blocks 3 to 4) overlap" in text
    fits = attempt(tmp_path, plugins=plugins, settings={"tread_config": config, "tiny_layers": 5})
    assert fits.error is None


@pytest.mark.parametrize(("count", "span"), [(30, (2, 28)), (40, (2, 38))])
def test_both_ends_count_and_negative_ones_come_from_the_end(count: int, span: tuple[int, int]):
    assert resolved((2, -2), count) == span
    assert resolved((-4, -1), 30) == (26, 29)
    assert resolved((0, count), count) is None
    assert resolved((-count - 1, 3), count) is None
