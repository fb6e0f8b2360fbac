"""The table of adapters: each trains by the real command, resumes bit for bit, and loads elsewhere.

What loads elsewhere is judged twice: the run's own file by the library that trained it, each layer's
forward asked with unit vectors in float64; the exported file by the formulas as they stand here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, safe_open
from support import comparable

from trainer_core.cli.main import main

lycoris = pytest.importorskip("trainer_lycoris")

OWN = "pytorch_lora_weights.safetensors"
TARGETS = "to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2,condition_embedder.time_proj,proj_out"
ATTENTION = {"target_module": ["Attention", "FeedForward"]}
MAPS = {**ATTENTION, "module_algo_map": {"FeedForward": {"factor": 8, "dim": 3}}}


def lyco(algo: str, **more: Any) -> list[str]:
    content = {"algo": algo, "multiplier": 1.0, "linear_dim": 2, "linear_alpha": 1, **more}
    return ["--lora_type", "lycoris", "--lycoris_config", json.dumps(content)]


KINDS: dict[str, list[str]] = {
    "lora": ["--lora_alpha", "2"],
    "lora-everywhere": [
        "--peft_lora_target_modules", TARGETS, "--lora_alpha", "3",
        "--lora_rank_pattern", '{"attn2.to_k": 2, "blocks.1.ffn.net.2": 3}',
        "--lora_alpha_pattern", '{"attn1.to_v": 8}', "--lora_dropout_pattern", '{"to_q": 0}',
    ],
    "dora": ["--use_dora", "true", "--lora_alpha", "8", "--gradient_checkpointing", "true"],
    "lokr": lyco("lokr", factor=4, apply_preset=MAPS),
    "lokr-whole": lyco("lokr", factor=4, full_matrix=True, apply_preset=ATTENTION),
    "lokr-both": lyco("lokr", factor=-1, decompose_both=True, rank_dropout=0.1),
    "lokr-dora": lyco("lokr", factor=6, dora_wd=True, apply_preset=ATTENTION),
    "loha": [*lyco("loha", apply_preset=ATTENTION), "--gradient_checkpointing", "true"],
    "loha-dora": lyco("loha", dora_wd=True, wd_on_output=False, apply_preset=ATTENTION),
    "locon": lyco("locon", dropout=0.1, apply_preset=ATTENTION),
    "full": lyco("full", apply_preset=ATTENTION),
}  # fmt: skip
BY_DIFFUSERS = ("lora", "lora-everywhere")

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command's own entry point in the world's folder; return its exit code and output."""
    monkeypatch.chdir(world)
    for name in [name for name in os.environ if name.startswith("TRAINER_")]:
        monkeypatch.delenv(name)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def train(call: Call, output: str, steps: int, *words: str) -> None:
    more = ("--learning_rate", "0.01", "--checkpoint_step_interval", "2", "--report_to", "none")
    code, said = call(
        "run", "--config", "config.json", "--output_dir", output, "--max_train_steps", str(steps),
        *more, *words,
    )  # fmt: skip
    assert code == 0, said


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_resumes_and_loads_elsewhere(kind: str, call: Call, world: Path):
    through, parts = f"adapters/{kind}", f"adapters/{kind}-parts"
    train(call, through, 4, *KINDS[kind])
    train(call, parts, 2, *KINDS[kind])
    train(call, parts, 4, *KINDS[kind])
    whole, resumed = comparable(world / through), comparable(world / parts)
    for name in (OWN, f"ema/{OWN}", "checkpoint-4/optimizer.safetensors"):
        assert whole[name] == resumed[name], name
    assert whole[OWN] != whole[f"ema/{OWN}"]

    ours = changes_by_the_library(world, world / through / OWN, kind)
    assert ours
    assert all(float(change.abs().max()) > 0 for change in ours.values())
    code, said = call("export", through, "--format", "comfyui")
    assert code == 0, said
    exported = world / through / "export" / f"{kind}-comfyui.safetensors"
    assert check_metadata(exported, kind) == check_metadata(world / through / OWN, kind)
    theirs = changes_by_formula(world, exported)
    assert theirs.keys() == ours.keys()
    for name, change in ours.items():
        error = float((theirs[name] - change).abs().max())
        assert error <= 1e-5 * float(change.abs().max()), name

    code, said = call("export", through, "--format", "diffusers")
    if kind not in BY_DIFFUSERS:
        assert (code, "--format comfyui" in said) == (2, True), said
        return
    assert code == 0, said
    again = changes_by_the_library(
        world, world / through / "export" / f"{kind}-diffusers.safetensors", kind
    )
    for name, change in ours.items():
        assert torch.equal(again[name], change), name


def test_lokr_with_tread_and_samples_on_wan(call: Call, world: Path):
    pytest.importorskip("trainer_tread")
    route = {"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 1}
    words = [
        *KINDS["lokr"], "--plugins", "wan,tread", "--tread_config", json.dumps({"routes": [route]}),
        "--gradient_checkpointing", "true", "--validation_prompt", "a red circle",
        "--validation_step_interval", "2", "--validation_resolution", "32x32",
        "--validation_num_video_frames", "5", "--validation_num_inference_steps", "2",
    ]  # fmt: skip
    train(call, "adapters/tread", 4, *words)
    train(call, "adapters/tread-parts", 2, *words)
    train(call, "adapters/tread-parts", 4, *words)
    whole, resumed = (comparable(world / "adapters" / n) for n in ("tread", "tread-parts"))
    assert whole[OWN] == resumed[OWN]
    plain = comparable(world / "adapters" / "lokr")
    assert whole[OWN] != plain[OWN]
    samples = sorted((world / "adapters" / "tread" / "validation").rglob("*.mp4"))
    assert {path.parent.name for path in samples} == {f"step-{n:08}" for n in (0, 2, 4)}
    live = {p.parent.name: p.read_bytes() for p in samples if "ema" not in p.name}
    assert live["step-00000000"] != live["step-00000004"]


def test_an_export_follows_a_model_and_a_config_that_were_moved(call: Call, world: Path):
    (world / "lycoris.json").write_text(KINDS["loha"][3])
    train(call, "adapters/moved", 2, "--lora_type", "lycoris", "--lycoris_config", "lycoris.json")
    wanted = ("export", "adapters/moved", "--format", "comfyui", "--output", "moved.safetensors")
    assert call(*wanted)[0] == 0
    first = (world / "moved.safetensors").read_bytes()
    (world / "lycoris.json").unlink()
    shutil.move(world / "model", world / "model-moved")
    try:
        here = ("--pretrained_model_name_or_path", "model-moved")
        beside = ("--lycoris_config", "adapters/moved/lycoris_config.json")
        for words, key in ((beside, "pretrained_model_name_or_path"), (here, "lycoris_config")):
            code, said = call(*wanted, *words)
            assert (code, key in said, "Traceback" in said) == (2, True, False), said
        code, said = call(*wanted, *beside, *here)
        assert code == 0, said
    finally:
        shutil.move(world / "model-moved", world / "model")
    again = load_file(world / "moved.safetensors")
    assert all(torch.equal(again[n], v) for n, v in load(first).items())


def test_a_run_in_comfyuis_format_resumes_bit_for_bit_and_diffusers_reads_it(
    call: Call, world: Path
):
    words = ("--lora_alpha", "3", "--lora_format", "comfyui")
    train(call, "adapters/native", 4, *words)
    train(call, "adapters/native-parts", 2, *words)
    # the format may change on the way: a resume reads either
    train(call, "adapters/native-parts", 3, "--lora_alpha", "3")
    train(call, "adapters/native-parts", 4, *words)
    names = (OWN, f"ema/{OWN}", "checkpoint-4/optimizer.safetensors")
    whole, parts = (comparable(world / "adapters" / n) for n in ("native", "native-parts"))
    assert [whole[name] == parts[name] for name in names] == [True, True, True]
    path = world / "adapters" / "native" / OWN
    assert "diffusion_model.blocks.0.self_attn.q.alpha" in load_file(path)
    ours, theirs = changes_by_formula(world, path), changes_by_the_library(world, path, "lora")
    assert ours.keys() == theirs.keys()
    for name, change in ours.items():
        assert float((theirs[name] - change).abs().max()) <= 1e-5 * float(change.abs().max())


def test_comfyuis_format_refuses_what_it_could_not_resume(call: Call):
    code, said = call(
        "run", "--config", "config.json", "--output_dir", "adapters/never", "--lora_alpha", "3",
        "--lora_format", "comfyui", "--peft_lora_target_modules", "to_q,proj_out",
    )  # fmt: skip
    assert code == 2, said
    assert (
        "lora_format = 'comfyui': cannot hold the alpha of proj_out, which is 3 at rank 4" in said
    )


def test_wrong_calls_exit_2_without_a_traceback(call: Call, world: Path):
    train(call, "adapters/wrong", 2)
    run = ("export", "adapters/wrong")
    for words, says in (
        ((*run,), "Missing option '--format'"),
        ((*run, "--format", "kohya"), "Write one of diffusers, comfyui"),
        ((*run, "--format", "comfyui", "--role", "low"), "Name transformer."),
        ((*run, "--format", "comfyui", "--frob", "1"), "unknown key"),
        ((*run, "--format", "comfyui", "--lora_rank", "8"), "r is 4 in the file and 8 in this run"),
        (("export", "clips", "--format", "comfyui"), "no run has written there"),
    ):
        code, said = call(*words)
        assert (code, says in said, "Traceback" in said) == (2, True, False), said
    assert not (world / "adapters" / "wrong" / "export").exists()


def check_metadata(path: Path, kind: str) -> str:
    """Return the digest of the settings."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    digest = told.pop("settings_digest")
    assert len(digest) == 40
    wanted = {
        "base_model": "model", "flavour": "t2v-480p-1.3b-2.1", "expert": "transformer",
        "noise_range": "0 to 1", "trained_steps": "4",
    }  # fmt: skip
    assert wanted.items() <= told.items()
    assert ("rank" in told) == (kind != "full")
    return digest


def transformer(world: Path) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(world / "model" / "transformer").eval()


def forward_changes(layers: Iterator[tuple[str, Any, Any]]) -> dict[str, torch.Tensor]:
    """Return W' - W of each (name, forward, frozen weight), asked with unit vectors in float64."""
    found = {}
    for name, forward, weight in layers:
        eye = torch.eye(weight.shape[1], dtype=torch.float64)
        with torch.no_grad():
            whole = forward(eye) - forward(torch.zeros_like(eye))  # (in, out): without the bias
        found[name] = whole.T - weight.double()
    return found


def changes_by_the_library(world: Path, path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Load a file into the stock transformer as its library does, and ask each layer's forward."""
    model = transformer(world)
    if "--lora_type" in KINDS[kind]:
        return changes_by_lycoris(model, path, kind)

    from diffusers import UniPCMultistepScheduler, WanPipeline
    from peft.tuners.lora import LoraLayer

    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model,
        scheduler=UniPCMultistepScheduler(),
    )  # fmt: skip
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    model.double().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return forward_changes((n, m.forward, m.base_layer.weight) for n, m in layers.items())


def changes_by_lycoris(model: Any, path: Path, kind: str) -> dict[str, torch.Tensor]:
    from lycoris import create_lycoris_from_weights
    from lycoris.modules.loha import LohaModule

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = {f"lycoris_{n}".replace(".", "_"): n for n in layers}
    weights = {n: layer.weight.clone() for n, layer in layers.items()}
    with torch.no_grad():
        if (
            kind == "loha-dora"
        ):  # magnitudes of inputs: the library reads only those of outputs back
            tensors = load_file(path)
            found = dict.fromkeys(name.partition(".")[0] for name in tensors)
            loras = [LohaModule(n, layers[names[n]], 1.0, 2, 1, weight_decompose=True,
                                wd_on_out=False) for n in found]  # fmt: skip
            for lora in loras:
                start = f"{lora.lora_name}."
                mine = {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
                lora.load_state_dict(mine)
        else:
            loras = create_lycoris_from_weights(1.0, str(path), model)[0].loras
        for lora in loras:
            lora.apply_to()
            lora.double().eval()
    model.double()
    return forward_changes(
        (names[lora.lora_name], lora.forward, weights[names[lora.lora_name]]) for lora in loras
    )


def changes_by_formula(world: Path, path: Path) -> dict[str, torch.Tensor]:
    """Rebuild each layer's change from an exported file; names by diffusers' converter of checkpoints."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    weights = transformer(world).state_dict()
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path).items():
        native, _, part = name.removeprefix("diffusion_model.").partition(".lora_")
        if not part:
            native, _, part = native.rpartition(".")
        layers.setdefault(native, {})[part.removesuffix(".weight")] = value.double()
    found = {}
    for native, t in layers.items():
        (name,) = convert_wan_transformer_to_diffusers({f"{native}.weight": 0})
        weight = weights[name].double()
        found[name.removesuffix(".weight")] = changed(t, weight) - weight
    return found


def changed(t: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    if "diff" in t:
        return weight + t["diff"]
    if "down" in t:
        rank, change = t["down"].shape[0], t["up"] @ t["down"]
    elif "hada_w1_a" in t:
        rank = t["hada_w1_b"].shape[0]
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        pairs = [(t[f"lokr_{w}_a"], t[f"lokr_{w}_b"]) for w in ("w1", "w2") if f"lokr_{w}_a" in t]
        rank = pairs[0][1].shape[0] if pairs else int(t["alpha"])
        w1, w2 = (
            t[f"lokr_{w}"] if f"lokr_{w}" in t else t[f"lokr_{w}_a"] @ t[f"lokr_{w}_b"]
            for w in ("w1", "w2")
        )
        change = torch.einsum("ij,kl->ikjl", w1, w2).reshape(weight.shape)
    change = change * (float(t["alpha"]) / rank if "alpha" in t else 1)
    if "dora_scale" not in t:
        return weight + change
    along = 1 if t["dora_scale"].shape[1] == 1 else 0
    whole = weight + change
    return t["dora_scale"] * whole / whole.square().sum(along, keepdim=True).sqrt()
