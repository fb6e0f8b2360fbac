"""Injection, start, dropout and targets on a tiny real Wan transformer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer_core.errors import ConfigError, ModelError
from trainer_core.rng import seed_global
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Moment, Placement
from trainer_lora.config import LoraSettings

CPU = torch.device("cpu")


def test_injected_without_effect_and_only_the_adapter_trains(tiny: Any, tmp_path: Path) -> None:
    model = tiny.stand_in()
    with torch.no_grad():
        base = tiny.predict(model.modules["transformer"])
    before = torch.get_rng_state()
    _, run = tiny.set_up(tmp_path, model, lora_rank=4)
    assert torch.equal(before, torch.get_rng_state())
    module = run.model.modules["transformer"]
    assert torch.equal(tiny.predict(module), base)
    names = tiny.trained(module)
    assert len(names) == 2 * 2 * 2 * 4  # blocks, attentions, A and B, q k v out
    assert all(".lora_" in name for name in names)
    assert all(value.dtype == torch.float32 for value in names.values())
    losses = tiny.train(module)
    assert losses[-1] < losses[0]
    assert not torch.equal(tiny.predict(module), base)


def test_start_is_a_function_of_seed_role_and_layer(tiny: Any, tmp_path: Path) -> None:
    def start(**keys: Any) -> dict[str, torch.Tensor]:
        run = tiny.make_run(tmp_path, seed=keys.pop("seed", 42))
        run.moment = keys.pop("moment", Moment(0))
        tiny.set_up(tmp_path, run=run, **keys)
        return dict(tiny.trained(run.model.modules["transformer"]))

    first = start()
    torch.rand(3)  # the global state plays no part
    again = start(moment=Moment(step=90, rank=1))  # nor do the rank and a resumed step
    assert all(torch.equal(first[name], again[name]) for name in first)
    fewer = start(peft_lora_target_modules="attn1.to_q")
    assert len(fewer) == 4
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    a = "blocks.0.attn1.to_q.lora_A.default.weight"
    assert not torch.equal(first[a], start(seed=43)[a])
    assert not torch.equal(first[a], first[a.replace("to_q", "to_k")])
    # uniform within 1 / sqrt(48 inputs), as nn.Linear starts
    assert 0.9 * 48**-0.5 < float(first[a].detach().abs().max()) <= 48**-0.5


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["to_q", "to_x"], "= 'to_x': no layer of transformer is called to_x"),
        ("blocks.0", "= 'blocks.0': blocks.0 is a WanTransformerBlock"),
        ("q", "= 'q': no layer"),
    ],
)
def test_targets_that_fit_nothing_are_named_with_examples(
    tiny: Any, tmp_path: Path, targets: Any, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.set_up(tmp_path, peft_lora_target_modules=targets)
    message = str(caught.value)
    assert message.startswith("peft_lora_target_modules " + says)
    assert "attn1.to_q" in message
    assert "ffn.net.0.proj" in message
    assert len(caught.value.problems) == 1


def test_a_layer_that_the_forward_does_not_reach_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny.stand_in()
    model.networks["transformer"] = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="would learn nothing"):
        tiny.set_up(tmp_path, model)


def test_everything_but_the_adapter_is_frozen(tiny: Any, tmp_path: Path) -> None:
    model = tiny.stand_in()
    model.modules["teacher"] = nn.Linear(2, 2)  # a role that is no trained expert
    model.networks["transformer"].extra = nn.Linear(2, 2)
    tiny.set_up(tmp_path, model)
    for module in (*model.modules.values(), *model.networks.values()):
        assert all(".lora_" in name for name in tiny.trained(module))


def test_full_training_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    model, said = tiny.stand_in(), []
    run = Run(
        CoreSettings(model_type="full"),
        placement=Placement(CPU, torch.float32, torch.float32),
        output_dir=tmp_path,
        notify=said.append,
    )
    plugin, _ = tiny.set_up(tmp_path, model, run)
    assert all(value.requires_grad for value in model.modules["transformer"].parameters())
    assert plugin.save_weights(run, tmp_path) is None
    assert plugin.load_weights(run, tmp_path) is None
    assert said == ["lora has no effect: model_type is full"]


def test_dropout_follows_the_seed_of_the_micro_step_and_is_off_in_eval(
    tiny: Any, tmp_path: Path
) -> None:
    _, run = tiny.set_up(tmp_path, lora_rank=4, lora_dropout=0.5)
    module = run.model.modules["transformer"]
    with torch.no_grad():
        for name, value in tiny.trained(module).items():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1))

    def at(*moment: int) -> torch.Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            seed_global(42, *moment, device=torch.device("cpu"))  # as the loop does
            out: torch.Tensor = tiny.predict(module)
        return out

    still = at(1)  # the base was in evaluation mode, so the adapter is
    assert torch.equal(still, at(2))
    module.train()
    first = at(1)
    assert not torch.equal(first, still)
    assert not torch.equal(first, at(2))
    assert torch.equal(first, at(1))


def test_recomputing_blocks_gives_the_gradients_of_the_same_masks(
    tiny: Any, tmp_path: Path
) -> None:
    gradients = []
    for checkpointing in (False, True):
        _, run = tiny.set_up(tmp_path, lora_rank=2, lora_dropout=0.3)
        module = run.model.modules["transformer"]
        module.train()
        if checkpointing:
            module.enable_gradient_checkpointing()
        with torch.random.fork_rng():
            seed_global(42, 3, device=torch.device("cpu"))
            tiny.predict(module).square().mean().backward()
        gradients.append({name: value.grad for name, value in tiny.trained(module).items()})
    plain, recomputed = gradients
    assert any(value.abs().max() > 0 for value in plain.values())
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_keys() -> None:
    settings = LoraSettings()
    assert (settings.lora_rank, settings.alpha, settings.lora_dropout) == (16, 16, 0.0)
    assert settings.targets == ("to_k", "to_out.0", "to_q", "to_v")
    listed = LoraSettings(peft_lora_target_modules=["a", "b"])
    assert listed.targets == LoraSettings(peft_lora_target_modules="b, a").targets
    with pytest.raises(ValueError, match="names no layer"):
        LoraSettings(peft_lora_target_modules="")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer_lora\n"
        "heavy = {'torch', 'peft', 'transformers', 'diffusers', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
