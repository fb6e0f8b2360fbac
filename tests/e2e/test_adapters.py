"""The table of adapters: each trains by the real command, resumes bit for bit, and loads elsewhere.

What loads elsewhere is judged twice: the run's own file by the library that trained it, each layer's
forward asked with unit vectors in float64; the exported file by the formulas as they stand here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
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
def call(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Run the command's own entry point in the world's folder; return its exit code and output."""
    monkeypatch.chdir(world)
    for name in [name for name in os.environ if name.startswith("TRAINER_")]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    yield run
    torch.set_num_threads(threads)


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
    check_metadata(exported, kind)
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


def check_metadata(path: Path, kind: str) -> None:
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
