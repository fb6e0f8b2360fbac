"""Whatever a settings file, an argument or a data file holds: settings, or problems that name a key."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trainer_core.catalogue import Catalogue
from trainer_core.data import load_backends
from trainer_core.data.entries import PENDING_KEYS, MediaEntry, TextEntry, VideoKeys
from trainer_core.errors import ConfigError
from trainer_core.optim import check_arguments
from trainer_core.settings import phrases
from trainer_core.settings.core import CoreSettings
from trainer_core.settings.explain import explain
from trainer_core.settings.load import Resolved, resolve
from trainer_core.testing.tiny import Tiny

INSTALLED = Catalogue.installed()
CATALOGUE = Catalogue([*INSTALLED.values(), *Catalogue.of({"tiny": Tiny}).values()])
MODELS = {"core": CoreSettings} | {
    entry.name: entry.info.settings for entry in CATALOGUE.usable() if entry.keys
}


def same(examples: int) -> settings:
    """Return settings of hypothesis that give the same examples every time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip


TOKENS = (
    *("true", "false", "null", "none", "auto", "latest", "0", "-1", "1e999", "nan", "inf", "16x16"),
    *("a,b", "~nobody/x", "..", "/", "\\", "{id}", "s3://a://b", "::// --seed", "weight_decay=1"),
    *("betas=(1,1)", "f(", "\x00", "\ud800", "'", '"', "[1", "{"),
)
WORDS = st.one_of(
    st.sampled_from(TOKENS),
    st.text(max_size=12),
    st.just("n" * 5000),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 0.5, 1e308, -0.0, 10**400, 2**63]),
    st.integers(-9, 99),
    st.floats(-2, 9),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def values_of(field: Any) -> st.SearchStrategy[Any]:
    """Return values near what a field allows, and far from it."""
    near = phrases.choices(field.annotation)
    inner = [a for b in phrases.branches(field.annotation) for a in typing.get_args(b)]
    near += [c for a in inner for c in phrases.choices(a)]
    return st.one_of(*([st.sampled_from(near)] if near else []), NUMBERS, JSON)


def objects(*models: Any, odd: typing.Sequence[str] = ()) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    known = {name: values_of(field) for name, field in fields.items()}
    pairs = st.one_of(
        st.sampled_from(sorted(known)).flatmap(lambda k: st.tuples(st.just(k), known[k])),
        st.tuples(st.sampled_from([*odd, "", "sedd", "--seed", "a b"]) | WORDS, JSON),
    )
    return st.lists(pairs, max_size=6).map(dict)


def accepted(call: Any) -> Any:
    """Return what a call gives; None where it raises problems that can be shown and name a key."""
    try:
        return call()
    except ConfigError as error:
        problems = error.problems
    assert problems
    for problem in problems:
        shown = str(problem).removeprefix(f"{problem.where}: ")
        assert shown.strip() == shown
        assert not shown.startswith((": ", "= "))
        assert len(shown.splitlines()) == 1
        assert "Input should" not in shown
        assert "input should" not in shown
    return None


def use(resolved: Resolved | None) -> None:
    """Do what every command does with settings before it looks at data."""
    if resolved is None:
        return
    json.dumps(explain(resolved), ensure_ascii=False).encode()
    assert resolved.core.length != (None, None)
    assert min(resolved.core.validation_size) > 0
    accepted(lambda: check_arguments(resolved.core))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / "clips").mkdir()
    return folder


@pytest.mark.parametrize("name", sorted(MODELS))
def test_any_value_of_any_key(name, folder):
    @same(250 if name == "core" else 60)
    @given(objects(MODELS[name]))
    def holds(keys):
        path = folder / "c.json"
        path.write_text(json.dumps({"model_family": "tiny", "model_type": "full", **keys}))
        use(accepted(lambda: resolve(path, environ={}, catalogue=CATALOGUE)))

    holds()


@same(150)
@given(
    st.lists(st.sampled_from([f"--{n}" for n in CoreSettings.model_fields]) | WORDS, max_size=6),
    st.dictionaries(st.sampled_from(["TRAINER_SEED", "TRAINER_EXTRA_ARGS", "TRAINER_X"]), WORDS),
)
def test_any_arguments_and_variables(folder, words, variables):  # fmt: skip
    (folder / "c.json").write_text('{"model_family": "tiny", "model_type": "full"}')
    path = folder / "c.json"
    use(accepted(lambda: resolve(path, args=words, environ=variables, catalogue=CATALOGUE)))


@same(150)
@given(
    st.binary(max_size=40)
    | st.text(st.sampled_from("{}[]:,\"'/*1eE+-.ntau \n\\"), max_size=24).map(str.encode)
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_for_a_config(folder, content):  # fmt: skip
    path = folder / "bytes.json"
    path.write_bytes(content)
    use(accepted(lambda: resolve(path, environ={}, catalogue=CATALOGUE)))


ENTRIES = st.builds(
    lambda base, keys, video: {**base, **keys, **video},
    st.sampled_from([
        {"id": "a", "dataset_type": "video", "instance_data_dir": "clips"},
        {"id": "b", "dataset_type": "text_embeds"}, {},
    ]),
    objects(MediaEntry, TextEntry, odd=[*PENDING_KEYS, "num_frames", "disable"]),
    st.fixed_dictionaries({}, optional={"video": objects(VideoKeys, odd=["repeats"]) | JSON}),
)  # fmt: skip


@same(300)
@given(st.lists(ENTRIES | JSON, max_size=3) | JSON)
def test_any_data_file(folder, entries):
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    found = accepted(lambda: load_backends(path, CoreSettings(cache_dir=str(folder / "cache"))))
    if found is not None:
        assert found.datasets
        for dataset in found.datasets:
            inside = Path(dataset.cache_dir).resolve()
            named = any(e.get("cache_dir_vae") for e in entries if isinstance(e, dict))
            assert named or inside.parent == (folder / "cache" / "vae").resolve()
