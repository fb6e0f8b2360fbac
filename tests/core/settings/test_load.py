from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, model_validator

from trainer_core import PluginInfo, PluginSettings, key
from trainer_core.catalogue import Catalogue
from trainer_core.errors import ConfigError
from trainer_core.settings.core import CoreSettings
from trainer_core.settings.explain import (
    explain,
    json_schema,
    plugin_versions,
    settings_markdown,
    write_settings,
)
from trainer_core.settings.load import Resolved, resolve
from trainer_core.settings.owners import expected_owner
from trainer_core.settings.pending import pending_plugins, pending_sentences


class Route(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ratio: float
    kind: Literal["keep", "drop"] = "drop"


class ToySettings(PluginSettings):
    """Toy keys."""

    toy_routes: list[Route] = key([], "Routes.")
    toy_token: str | None = key(None, "Secret.", secret=True, free=True)
    toy_low: int = key(1, "Lower end.", aliases=("toy_minimum",))
    toy_high: int = key(2, "Upper end.")
    toy_flag: bool = key(False, "Flag.", free=True)

    @model_validator(mode="after")
    def _ordered(self) -> ToySettings:
        if self.toy_low > self.toy_high:
            raise ValueError("toy_low lies above toy_high; swap them")
        return self


class Toy:
    info = PluginInfo(
        settings=ToySettings, provides=("model", "adapter"),
        values=("model_family=toy", "lora_type=standard"),
    )  # fmt: skip

    def __init__(self, settings: ToySettings) -> None:
        self.settings = settings


CATALOGUE = Catalogue.of({"toy": Toy})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(
        content: Any = None, *args: str, environ: dict[str, str] | None = None, **more: Any
    ) -> Resolved:
        Path("c.json").write_text(json.dumps({"model_family": "toy", **(content or {})}))
        more.setdefault("catalogue", CATALOGUE)
        return resolve(Path("c.json"), args=args, environ=environ or {}, **more)

    return call


def refusal(run, *args, **more) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run(*args, **more)
    return [str(problem) for problem in caught.value.problems]


def test_each_source_outranks_the_one_before(run):
    environ: dict[str, str] = {}
    assert run({}, environ=environ).core.seed == 42
    assert run({"seed": 1}, environ=environ).core.seed == 1
    environ["TRAINER_SEED"] = "2"
    assert run({"seed": 1}, environ=environ).core.seed == 2
    environ["TRAINER_EXTRA_ARGS"] = '--seed 3 --validation_prompt "a cat"'
    resolved = run({"seed": 1}, environ=environ)
    assert (resolved.core.seed, resolved.core.validation_prompt) == (3, "a cat")
    resolved = run({"seed": 1}, "--seed", "4", environ=environ)
    assert resolved.core.seed == 4
    assert resolved.origins["seed"] == "command line"
    assert resolved.origins["validation_prompt"] == "TRAINER_EXTRA_ARGS"
    assert resolved.origins["model_family"] == "c.json"
    assert "learning_rate" not in resolved.origins


def test_every_form_of_the_command_line(run):
    core = run(
        {}, "--train-batch-size=2", "--learning_rate", "1e-5", "--gradient_checkpointing",
        "--no_use_ema", "--disable_benchmark", "true", "--report_to", '["none"]',
        "--tracker_run_name", "2024", "--validation_prompt", "[a] {b", "--framerate", "24",
        "--validation_resolution", "512", "--lr_end=0",
    ).core  # fmt: skip
    assert (core.train_batch_size, core.learning_rate, core.framerate) == (2, 1e-5, 24.0)
    assert (core.gradient_checkpointing, core.use_ema, core.disable_benchmark) == (
        True,
        False,
        True,
    )
    assert (core.report_to, core.tracker_run_name) == (("none",), "2024")
    assert (core.validation_prompt, core.validation_resolution) == ("[a] {b", "512")


def test_texts_mean_what_they_say(run):
    resolved = run(
        {"use_ema": "true", "disable_benchmark": "false", "toy_routes": '[{"ratio": 1}]'}
    )
    assert (resolved.core.use_ema, resolved.core.disable_benchmark) == (True, False)
    assert resolved.plugins["toy"].toy_routes == [Route(ratio=1)]


def test_null_is_the_default_and_takes_back_a_weaker_source(run):
    assert run({"seed": None}).core.seed == 42
    resolved = run({"validation_prompt": "x", "plugins": []}, "--validation_prompt", "null")
    assert resolved.core.validation_prompt is None
    resolved = run({}, "--model_family=null", "--plugins=toy")
    assert resolved.core.model_family == "toy"


def test_a_length_at_its_default_does_not_count_as_set(run):
    assert run({"max_train_steps": 5, "num_train_epochs": None}).core.length == (5, None)


def test_all_problems_come_at_once_each_with_its_place(run):
    lines = refusal(
        run,
        {"lerning_rate": 1, "train_batch_size": 0, "toy_low": 3, "hub_model_id": "x",
         "mixed_precision": "bf17", "max_train_steps": 0, "num_train_epochs": 0},
        "--seed", "x", "--report_to", "tensorbord", "word",
        environ={"TRAINER_LEARNIG_RATE": "1", "TRAINER_LR_END": "-1"},
    )  # fmt: skip
    expected = [
        "c.json: lerning_rate = 1: unknown key; did you mean 'learning_rate'?",
        "c.json: train_batch_size = 0: must be a whole number, at least 1.",
        "c.json: toy_low: toy_low lies above toy_high; swap them.",
        "c.json: hub_model_id = 'x': is not built yet",
        "c.json: mixed_precision = 'bf17': must be one of no, bf16. Did you mean 'bf16'?",
        "max_train_steps and num_train_epochs are both 0",
        "command line: seed = 'x': must be a whole number, at least 0.",
        "command line: report_to = 'tensorbord': no installed plugin provides this value.",
        "command line: word: belongs to no key.",
        "environment: TRAINER_LEARNIG_RATE: names no key; did you mean 'TRAINER_LEARNING_RATE'?",
        "environment: lr_end = '-1': must be a number, at least 0.",
    ]
    for text in expected:
        part = text.replace("toy_low:", "toy_high, toy_low:", 1) if "swap" in text else text
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"train_batch_size": True}, "must be a whole number, at least 1"),
        ({"train_batch_size": 1.5}, "must be a whole number, at least 1"),
        ({"seed": [1]}, "must be a whole number"),
        ({"use_ema": "perhaps"}, "must be true or false"),
        ({"tracker_run_name": 5}, "must be text. Put it in quotes."),
        ({"caption_dropout_probability": 1.5}, "a number, at least 0, at most 1"),
        ({"learning_rate": "inf"}, "must be a number, above 0"),
        ({"framerate": "sauce"}, "must be a number, above 0 or \"source\". Did you mean 'source'?"),
        ({"report_to": 5}, "must be a list of text"),
        ({"validation_resolution": "big"}, "write WIDTHxHEIGHT in pixels"),
        (
            {"toy_routes": [{"ratio": 1}, {"ratio": "x"}]},
            "toy_routes[1].ratio = 'x': must be a num",
        ),
        ({"toy_routes": [{}]}, "toy_routes[0].ratio: is required"),
        ({"toy_routes": [{"ratio": 1, "kin": 1}]}, "is unknown here; did you mean 'kind'?"),
        ({"toy_routes": [{"ratio": 1, "kind": "x"}]}, "must be 'keep' or 'drop'"),
        ({"toy_routes": 3}, "toy_routes = 3: must be a list"),
        ({"toy_low": 1, "toy_minimum": 2}, "'toy_low' and 'toy_minimum' are two names of one key"),
    ],
)
def test_wrong_values_say_what_is_allowed(run, content, text):
    lines = refusal(run, content)
    assert len(lines) == 1
    assert text in lines[0]


def test_a_bare_option_of_a_key_that_needs_a_value(run):
    assert "seed: needs a value: a whole number" in refusal(run, {}, "--seed", "--use_ema")[0]


def test_a_problem_never_hides_behind_the_default_that_stands_in_for_it(run):
    lines = refusal(run, {"max_train_steps": -1, "num_train_epochs": 0})
    assert lines == ["c.json: max_train_steps = -1: must be a whole number, at least 0."]


def test_cross_key_problems_of_one_model_are_all_found(run):
    lines = refusal(
        run,
        {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True,
         "flow_schedule_auto_shift": True, "flow_schedule_shift": 3},
    )  # fmt: skip
    assert len(lines) == 2


def test_other_spellings_reach_their_key(run):
    resolved = run({"toy_minimum": 2})
    assert resolved.plugins["toy"].toy_low == 2


def test_secrets_are_shown_nowhere(run, tmp_path):
    resolved = run({"toy_token": "hunter2"})
    write_settings(resolved, tmp_path)
    text = (tmp_path / "settings.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(explain(resolved)))
    assert "hunter2" not in text + str(resolved.resolved()) + str(resolved.fixed())
    assert resolved.resolved()["toy_token"] == "***"
    assert "hunter2" not in refusal(run, {"toy_token": ["hunter2"]})[0]
    assert "hunter2" not in refusal(run, {"hub_tokn": 1, "toy_tokens": "hunter2"})[1]


def test_the_record_of_a_run(run):
    resolved = run({"toy_low": 0})
    told = explain(resolved)
    assert told["settings"]["toy_low"] == 0
    assert told["origins"] == {"model_family": "c.json", "toy_low": "c.json"}
    assert told["plugins"][0]["why"] == "model_family is toy"
    assert plugin_versions(resolved) == {"toy": ""}
    assert "toy_low" in resolved.fixed()
    assert "toy_flag" not in resolved.fixed()


def test_pending_keys_are_refused_whatever_their_value_and_owners_win(run):
    for value in ("x", False, None):
        assert "is not built yet" in refusal(run, {"toy_new": value}, pending=NEW)[0]
    assert run({"toy_low": 2}, pending={"toy_low": "is not built yet"}).plugins["toy"].toy_low == 2
    text = refusal(run, {"seed": 7}, pending={"seed=7": "is not built yet"})[0]
    assert text == "c.json: seed = 7: is not built yet"


NEW = {"toy_new": "is not built yet"}


def test_a_known_plugin_that_is_not_installed_is_named(run):
    text = refusal(run, {"lora_rank": 4})[0]
    assert "it belongs to the plugin lora, which is not installed" in text


def test_the_pending_table_is_disjoint_from_what_core_owns_and_each_entry_has_a_way_out():
    sentences = pending_sentences()
    assert not set(sentences) & set(CoreSettings.model_fields)
    for name, text in sentences.items():
        assert text.startswith("is not built"), name
        assert "Remove it" in text or "Write " in text, name
        if "=" in name:
            assert name.partition("=")[0] in CoreSettings.model_fields
        elif pending_plugins()[name] != "core":
            assert expected_owner(name) == pending_plugins()[name]


def test_reference_page_and_schema_hold_every_key():
    page, schema = settings_markdown(CATALOGUE), json_schema(CATALOGUE)
    for name in (*CoreSettings.model_fields, *ToySettings.model_fields):
        assert f"| `{name}` |" in page
        assert name in schema["properties"]
        assert f"--{name}" in schema["properties"]
    assert "Route" in schema["$defs"]
    assert json.dumps(schema)
