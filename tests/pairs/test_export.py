"""``trainer export`` of runs with two experts: one file each, proven, or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs.twins import ROLES, Twins, TwinsModel

from trainer_core.changes import by_layer, weight_change
from trainer_core.errors import CheckpointError, ConfigError, PluginError
from trainer_core.exporting import Wanted, export, settings_of
from trainer_core.files import read_tensors
from trainer_core.plugins import build
from trainer_core.testing.harness import Finished, train

lora = pytest.importorskip("trainer_lora")
lycoris = pytest.importorskip("trainer_lycoris")

NAMES = "q,k,v,out"
LAYER = "diffusion_model.layers.2.value"
ATTENTION = {"target_name": [r".*\.(q|k|v|out)$"]}
LOKR = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4, "apply_preset": ATTENTION}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 2, "lora_alpha": 3, "peft_lora_target_modules": NAMES},
    "dora": {"lora_rank": 2, "peft_lora_target_modules": NAMES, "use_dora": True},
    "lokr": {"lora_type": "lycoris", "lycoris_config": LOKR},
}


@dataclass(frozen=True)
class Runs:
    """Finished runs by kind, and how to export them."""

    folder: Path
    finished: Mapping[str, Finished]

    def plugins(self, kind: str) -> dict[str, type]:
        adapter = {"lycoris": lycoris.Lycoris} if kind == "lokr" else {"lora": lora.Lora}
        return {**adapter, "tiny": Twins}

    def export(self, kind: str, *, args: tuple[str, ...] = (), **wanted: Any) -> list[Any]:
        from trainer_core.catalogue import Catalogue

        folder = wanted.pop("folder", self.finished[kind].folder)
        catalogue = Catalogue.of(self.plugins(kind))
        resolved = settings_of(folder, args=args, catalogue=catalogue)
        wanted.setdefault("format", "comfyui")
        host = build(resolved, catalogue=catalogue)
        return export(resolved, host, Wanted(folder, **wanted), say=lambda _: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("export")
    made = Runs(folder, {})
    core = {"model_type": "lora", "use_ema": True, "learning_rate": 1e-2, "max_train_steps": 6}
    finished = {
        kind: train(folder, plugins=made.plugins(kind), settings={**core, **keys}, output=kind)
        for kind, keys in KINDS.items()
    }
    return Runs(folder, finished)


def live_change(network: Any, layer: str) -> torch.Tensor:
    """Ask the trained layer itself, with unit vectors in float64, before and without its adapter."""
    module = network.get_submodule(layer).double().eval()
    eye = torch.eye(module.in_features, dtype=torch.float64)
    with torch.no_grad():
        changed = module(eye) - module(torch.zeros_like(eye))
    weight = module.base_layer.weight.detach().double()
    return changed.T - weight


@pytest.mark.parametrize("kind", KINDS)
def test_both_experts_get_a_file_that_equals_what_was_trained(runs: Runs, kind: str):
    from trainer_core import exporting

    loaded: list[TwinsModel] = []
    original = exporting._restore

    def watch(run: Any, *rest: Any, **more: Any) -> None:
        original(run, *rest, **more)
        loaded.append(run.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_restore", watch)
        written = runs.export(kind)
    assert [one.path.name for one in written] == [
        f"{kind}-comfyui-{role}.safetensors" for role in ROLES
    ]
    (model,) = loaded
    contents = []
    for role, one in zip(ROLES, written, strict=True):
        assert (one.num_layers, one.error <= 1e-5) == (16, True)
        layers = by_layer(read_tensors(one.path), prefix="diffusion_model.")
        names = model.layers_of(tuple(layers))
        for native, parts in layers.items():
            network = model.modules[role]
            weight = network.get_submodule(names[native]).base_layer.weight
            ours = live_change(network, names[native])
            assert ours.abs().max() > 0
            error = (weight_change(parts, weight.float()) - ours).abs().max()
            assert error <= 1e-5 * ours.abs().max()
        contents.append(one.path.read_bytes())
    assert contents[0] != contents[1]


def test_one_expert_averaged_weights_and_checkpoints(runs: Runs, tmp_path: Path):
    (only,) = runs.export("lora", role="transformer_2", output=tmp_path / "low.safetensors")
    assert only.path == tmp_path / "low.safetensors"
    (averaged,) = runs.export("lora", role="transformer_2", ema=True)
    assert averaged.path.name == "lora-ema-comfyui-transformer_2.safetensors"
    assert averaged.path.read_bytes() != only.path.read_bytes()
    newest = runs.finished["lora"].folder / "checkpoint-6"
    (of_checkpoint,) = runs.export("lora", folder=newest, role="transformer_2")
    assert of_checkpoint.path.parent == newest / "export"
    assert of_checkpoint.path.read_bytes() == only.path.read_bytes()
    (averaged_there,) = runs.export("lora", folder=newest, role="transformer_2", ema=True)
    assert averaged_there.path.read_bytes() == averaged.path.read_bytes()
    older = runs.finished["lora"].folder / "checkpoint-4"
    (before,) = runs.export("lora", folder=older, role="transformer_2")
    assert before.path.read_bytes() != only.path.read_bytes()
    # an export below a checkpoint leaves the checkpoint whole
    (again,) = runs.export("lora", folder=newest, role="transformer_2")
    assert again.path.read_bytes() == only.path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "wanted", "says"),
    [
        ("lora", {"role": "high"}, "--role = 'high'.*transformer or transformer_2"),
        ("lora", {"output": Path("x.safetensors")}, "one file holds one of them.*2 files"),
        ("lora", {"format": "kohya"}, "--format = 'kohya'.*diffusers, comfyui"),
        ("dora", {"format": "diffusers"}, "--format comfyui"),
        ("lokr", {"format": "diffusers"}, "--format comfyui"),
        ("lokr", {"format": "kohya"}, "--format comfyui"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(runs: Runs, kind: str, wanted: Any, says: str):
    with pytest.raises(ConfigError, match=says):
        runs.export(kind, **wanted)


def test_folders_without_weights_are_refused(runs: Runs, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"settings\.json"):
        runs.export("lora", folder=tmp_path)
    settings = runs.finished["lora"].folder / "settings.json"
    (tmp_path / "settings.json").write_text(settings.read_text())
    with pytest.raises(ConfigError, match="neither final weights nor a checkpoint"):
        runs.export("lora", folder=tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        runs.export("lora", folder=tmp_path)


def test_a_run_without_averages_has_none_to_export(runs: Runs):
    settings = {**KINDS["lora"], "model_type": "lora", "max_train_steps": 2}
    done = train(runs.folder, plugins=runs.plugins("lora"), settings=settings, output="plain")
    for folder in (done.folder, done.folder / "checkpoint-2"):
        with pytest.raises(ConfigError, match=r"no averaged weights.*Leave --ema out"):
            runs.export("lora", folder=folder, ema=True)


def test_a_full_fine_tune_has_no_adapter_to_export(runs: Runs):
    class One(Twins):
        @lora.hooks.hookimpl
        def save_weights(self, run: Any, folder: Path) -> list[str]:
            torch.save({}, folder / "nothing.pt")
            return ["nothing.pt"]

        @lora.hooks.hookimpl
        def load_weights(self, run: Any, folder: Path) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runs, "plugins", lambda self, kind: {"tiny": One})
        settings = {"model_type": "full", "max_train_steps": 2}
        done = train(runs.folder, plugins={"tiny": One}, settings=settings, output="whole")
        with pytest.raises(PluginError, match="whole pipeline already"):
            runs.export("lora", folder=done.folder)


def swapped(self: TwinsModel, layer: str) -> str:
    """Take q for k."""
    start, _, last = layer.rpartition(".")
    word = {"q": "key", "k": "query", "v": "value", "out": "output"}[last]
    return f"{start.replace('blocks', 'layers')}.{word}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_name_is_found_and_no_file_is_left(
    runs: Runs, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(TwinsModel, "native_name", swapped)
    output = tmp_path / "wrong.safetensors"
    with pytest.raises(CheckpointError, match="was not written"):
        runs.export(kind, role="transformer", output=output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_scale_is_found_and_an_older_file_stays(
    runs: Runs, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from trainer_core import adapters

    output = tmp_path / "file.safetensors"
    runs.export(kind, role="transformer", output=output)
    good = output.read_bytes()
    write = adapters.write_tensors

    def scale_one_layer(path: Path, tensors: Any, **more: Any) -> None:
        scaled = tuple(f"{LAYER}.{part}" for part in ("alpha", "lora_up.weight"))
        changed = {n: v * (1.0001 if n in scaled else 1) for n, v in tensors.items()}
        write(path, changed, **more)

    monkeypatch.setattr(adapters, "write_tensors", scale_one_layer)
    with pytest.raises(CheckpointError, match="off by"):
        runs.export(kind, role="transformer", output=output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_bytes() == good
