"""Through the real loop: what is quantised, that it learns, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer_core import ConfigError, hookimpl
from trainer_core.quantising import blocks_on_the_host, inner_tensors
from trainer_core.testing.harness import Finished, attempt, train
from trainer_core.types import Placement
from trainer_torchao import TorchAO
from trainer_torchao.weights import KINDS

pytest.importorskip("torchao")
lora = pytest.importorskip("trainer_lora")
KEYS = {"model_type": "lora", "peft_lora_target_modules": "q,k,v,out", "lora_rank": 4}
PLUGINS = {"torchao": TorchAO, "lora": lora.Lora}


def run(folder: Path, output: str, **keys: Any) -> Finished:
    named = None if keys.get("base_model_precision") else ["lora"]
    return train(
        folder,
        plugins=PLUGINS,
        named=named,
        settings={**KEYS, **keys},
        output=output,
        num_held_out=2,
    )


def held_out(done: Finished) -> list[float]:
    return [event["eval/eval"] for event in done.events if event["kind"] == "eval"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_as_the_plain_run_does(tmp_path: Path, kind: str):
    keys = {"max_train_steps": 20, "learning_rate": 1e-2}
    plain, stored = (
        run(tmp_path, "plain", **keys),
        run(tmp_path, kind, **keys, base_model_precision=kind),
    )
    assert stored.draws == plain.draws
    first, last = held_out(stored)
    assert last < first, "the held-out loss falls"
    gain = held_out(plain)[0] - held_out(plain)[1]
    assert first - last > 0.8 * gain, "and by about as much"


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_the_blocks_is_stored_so_and_no_other(tmp_path: Path, kind: str):
    done = run(tmp_path, "output", base_model_precision=kind, max_train_steps=1)
    assert any(f"blocks in {kind}: 24 layers, " in line for line in done.said)


class Watch(TorchAO):
    """Keeps the model after it was quantised."""

    model: Any = None

    def attach(self, run: Any) -> None:
        Watch.model = run.model


def test_adapters_and_what_lies_outside_of_blocks_stay_as_they_are(tmp_path: Path):
    plugins = {"torchao": Watch, "lora": lora.Lora}
    train(tmp_path, plugins=plugins, settings={**KEYS, "base_model_precision": KINDS[0]})
    network = Watch.model.modules["transformer"]
    for name, parameter in network.named_parameters():
        inside = name.startswith("blocks.")
        weight = inside and name.endswith(".weight") and "lora_" not in name and "norm" not in name
        assert bool(inner_tensors(parameter)) == weight, name
        assert parameter.requires_grad == ("lora_" in name)
    assert isinstance(network.head, nn.Linear)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_no_bit(tmp_path: Path, checkpointing: bool):
    keys = {"base_model_precision": KINDS[0], "gradient_checkpointing": checkpointing}
    plain = run(tmp_path, "plain", base_model_precision=KINDS[0])
    assert run(tmp_path, "output", **keys).weights() == plain.weights()


def test_where_it_is_quantised_changes_nothing_on_one_device(tmp_path: Path):
    keys = {"base_model_precision": KINDS[0]}
    runs = [run(tmp_path, via, **keys, quantize_via=via) for via in ("cpu", "accelerator")]
    assert runs[0].steps == runs[1].steps  # the files also tell the settings


def test_in_a_plan_blocks_belong_on_the_device():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    placement = Placement(cuda, torch.bfloat16, torch.float32, blocks=cpu)
    for sketch, home in ((None, cpu), (object(), cuda)):
        run = SimpleNamespace(placement=placement, sketch=sketch)
        with blocks_on_the_host(run) as found:
            assert run.placement.blocks == cpu
            assert found == home
        assert run.placement is placement


def refused(folder: Path, **keys: Any) -> str:
    done = attempt(folder, plugins=PLUGINS, settings={**KEYS, **keys})
    assert isinstance(done.error, ConfigError), done.error
    return str(done.error)


def test_weights_that_are_trained_are_refused(tmp_path: Path):
    text = refused(
        tmp_path, base_model_precision=KINDS[0], model_type="full", peft_lora_target_modules="q",
        plugins=["torchao", "tiny"], model_family="tiny",
    )  # fmt: skip
    assert "trains all of them" in text
    assert "set model_type to lora" in text


def test_bfloat16_around_it_needs_products_in_bfloat16(tmp_path: Path):
    text = refused(tmp_path, base_model_precision=KINDS[0], base_model_default_dtype="bf16")
    assert "base_model_default_dtype" in text
    assert "needs mixed_precision bf16" in text


def test_an_encoder_that_nobody_can_store_so_is_refused(tmp_path: Path):
    text = refused(tmp_path, base_model_precision=KINDS[0], text_encoder_1_precision=KINDS[0])
    assert "no text encoder of this run" in text


def test_nothing_of_torchs_state_is_left_changed(tmp_path: Path):
    before = torch.get_rng_state(), torch.get_default_dtype()
    run(tmp_path, "output", base_model_precision=KINDS[0], max_train_steps=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


class Dynamic(TorchAO):
    """Rounds inputs as well as weights, which torchao offers too."""

    @hookimpl(wrapper=True)
    def load_model(self, run: Any):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = yield
        for block in model.stacks()["transformer"].blocks:
            quantize_(block, Int8DynamicActivationInt8WeightConfig())
        return model


def test_rounded_inputs_let_no_gradient_through_and_end_the_run(tmp_path: Path):
    plugins = {"torchao": Dynamic, "lora": lora.Lora}
    done = attempt(tmp_path, plugins=plugins, settings={**KEYS, "base_model_precision": KINDS[0]})
    assert isinstance(done.error, ConfigError), done.error
    assert "lets no gradient through to block 0 of transformer" in str(done.error)
