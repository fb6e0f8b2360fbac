"""Every key of the quick start's config files is known: owned, or pending with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core import PluginInfo, PluginSettings, key
from trainer_core.catalogue import Catalogue
from trainer_core.errors import ConfigError, Problem
from trainer_core.settings.files import read_config
from trainer_core.settings.load import resolve
from trainer_core.settings.pending import pending_sentences

FOLDER = Path(__file__).parents[2] / "data" / "quickstart"
FILES = sorted(p for p in FOLDER.glob("*.json") if p.stem != "multidatabackend")


class WanKeys(PluginSettings):
    pretrained_t5_model_name_or_path: str | None = key(None, "Encoder.", free=True)
    pretrained_transformer_model_name_or_path: str | None = key(None, "Transformer.", free=True)
    pretrained_transformer_subfolder: str | None = key(None, "Its folder.", free=True)
    pretrained_vae_model_name_or_path: str | None = key(None, "VAE.", free=True)
    lora_rank: int = key(16, "Rank.")
    lycoris_config: str | None = key(None, "Adapters of LyCORIS.", free=True)
    attention_mechanism: str = key("diffusers", "Kernel.", free=True)


class Wan:
    info = PluginInfo(
        settings=WanKeys, provides=("model",), values=("model_family=wan", "lora_type=standard")
    )

    def __init__(self, settings: WanKeys) -> None:
        self.settings = settings


class TreadKeys(PluginSettings):
    tread_config: dict[str, Any] = key(about="Routes.")


class Tread:
    info = PluginInfo(settings=TreadKeys, switch="tread_config")

    def __init__(self, settings: TreadKeys) -> None:
        self.settings = settings


class Quantiser:
    info = PluginInfo(provides=("quantiser",), values=("base_model_precision=int8-quanto",))

    def __init__(self, settings: None) -> None:
        pass


CATALOGUE = Catalogue.of({"wan": Wan, "tread": Tread, "quanto": Quantiser})


def is_pending(name: str, value: object) -> bool:
    sentences = pending_sentences()
    return name in sentences or f"{name}={value}" in sentences


def test_the_files_are_there():
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_exactly_the_pending_keys_are_refused_and_the_rest_is_valid(path, tmp_path):
    content = {"model_family": "wan", **read_config(path)}
    refused = {name for name, value in content.items() if is_pending(name, value)}
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(content))
    problems: tuple[Problem, ...] = ()
    try:
        resolve(whole, environ={}, catalogue=CATALOGUE)
    except ConfigError as error:
        problems = error.problems
    assert {problem.key for problem in problems} == refused
    assert len(problems) == len(refused)
    rest = tmp_path / "rest.json"
    rest.write_text(json.dumps({k: v for k, v in content.items() if k not in refused}))
    assert resolve(rest, environ={}, catalogue=CATALOGUE).unused == ()
