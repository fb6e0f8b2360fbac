"""Every config file that ships can be used as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer_core.catalogue import Catalogue
from trainer_core.data import load_backends
from trainer_core.settings.core import BUILTIN_OPTIMIZERS
from trainer_core.settings.files import read_json
from trainer_core.settings.load import resolve
from trainer_core.settings.owners import expected_owner
from trainer_core.settings.pending import pending_sentences

ROOT = Path(__file__).parents[2]
SUFFIX = ".example"
SHIPPED = sorted(
    path
    for pattern in ("*.json", f"*.json{SUFFIX}")
    for path in (ROOT / "config").rglob(pattern)
    if not path.with_name(path.name + SUFFIX).exists()  # a user's own copy of an example
)
LIBRARIES = [path for path in SHIPPED if path.name.startswith("user_prompt_library")]
DATA = [path for path in SHIPPED if isinstance(read_json(path), list)]
CONFIGS = [path for path in SHIPPED if path not in (*LIBRARIES, *DATA)]
SELECTORS = (
    "model_family", "lora_type", "report_to", "optimizer", "base_model_precision",
    "text_encoder_1_precision",
)  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with all presets in it, examples under the names they ask for."""
    for path in SHIPPED:
        copy = tmp_path / name(path).removesuffix(SUFFIX)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_folders(path: Path) -> None:
    for entry in read_json(path):
        if "instance_data_dir" in entry:
            Path(entry["instance_data_dir"]).mkdir(parents=True)


def test_there_are_presets_of_each_kind():
    examples = {path.name for path in SHIPPED if path.name.endswith(SUFFIX)}
    wanted = ("config", "multidatabackend", "user_prompt_library")
    assert {f"{kind}.json{SUFFIX}" for kind in wanted} <= examples
    assert CONFIGS
    assert DATA


def lacking_for(content: dict[str, Any], catalogue: Catalogue) -> set[str]:
    """Return the plugins that are not here and that own a key of a config, or that its model requires."""
    owners = {owner for key in content if (owner := expected_owner(key)) not in (None, *catalogue)}
    needs = {
        need
        for entry in catalogue.providing(f"model_family={content.get('model_family')}")
        for need in entry.info.requires
        if isinstance(need, str) and not catalogue.answering(need)
    }
    return {str(owner) for owner in owners} | needs


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_resolves_and_so_do_its_datasets(path: Path, workplace: Path):
    catalogue, content = Catalogue.installed(), read_json(path)
    for key in SELECTORS:
        value = content.get(key, "none")
        if value not in ("none", "no_change", *BUILTIN_OPTIMIZERS) and not catalogue.providing(
            f"{key}={value}"
        ):
            pytest.skip(f"nothing installed provides {key}={value}")
    if lacking := lacking_for(content, catalogue):
        pytest.skip(f"{', '.join(sorted(lacking))} is not installed")
    resolved = resolve(workplace / name(path).removesuffix(SUFFIX), environ={}, catalogue=catalogue)
    assert resolved.unused == ()
    data = workplace / resolved.core.data_backend_config
    make_folders(data)
    backends = load_backends(data, resolved.core)
    assert backends.notes == ()
    measures = resolved.core.eval_steps_interval > 0
    assert any(dataset.held_out for dataset in backends.datasets) or not measures


@pytest.mark.parametrize("path", DATA, ids=name)
def test_a_data_file_belongs_to_a_config(path: Path):
    wanted = name(path).removesuffix(SUFFIX)
    assert wanted in {read_json(config).get("data_backend_config") for config in CONFIGS}


@pytest.mark.parametrize("path", LIBRARIES, ids=name)
def test_a_prompt_library_is_a_table_of_texts(path: Path):
    prompts = read_json(path)
    assert prompts
    assert all(isinstance(text, str) and text.strip() for text in prompts.values())
    key = "user_prompt_library"
    is_pending = key in pending_sentences()
    assert is_pending == ("Not read yet" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_preset_says_what_it_is_and_names_no_machine(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("// ")
    assert not any(f'"{root}' in text for root in ("/", "~", "C:"))
