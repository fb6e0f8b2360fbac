"""Learning rates, clipping and optimisers against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer_core import ConfigError
from trainer_core.optim import (
    Optimizers,
    clip_gradients,
    learning_rate,
    schedule_sentence,
    trained_dtype,
)
from trainer_core.settings.arguments import parse_arguments
from trainer_core.settings.core import CoreSettings
from trainer_core.types import ParameterGroup


def rates(total: int, **keys: object) -> list[float]:
    settings = CoreSettings(learning_rate=1.0, **keys)
    return [
        learning_rate(step, settings=settings, base=1.0, total=total)
        for step in range(1, total + 1)
    ]


def test_warm_up_rises_linearly_and_ends_at_the_learning_rate():
    assert rates(8, lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    )


def test_cosine_runs_over_what_warm_up_leaves():
    got = rates(12, lr_scheduler="cosine", lr_warmup_steps=2)
    expected = [0.5, 1.0] + [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert got == pytest.approx(expected)


def test_linear_polynomial_and_restarts():
    assert rates(4, lr_scheduler="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    got = rates(4, lr_scheduler="polynomial", lr_power=2.0, lr_end=0.5)
    assert got == pytest.approx([0.5 + 0.5 * (1 - i / 4) ** 2 for i in range(4)])
    twice = rates(8, lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert twice[:4] == pytest.approx(twice[4:])


def test_constant_ignores_warm_up_and_says_so():
    keys = {"lr_scheduler": "constant", "lr_warmup_steps": 5}
    assert rates(3, **keys) == [1.0, 1.0, 1.0]
    assert "no effect" in str(schedule_sentence(CoreSettings(**keys), 3))


def test_a_warm_up_of_the_whole_run_is_reported_in_one_sentence():
    settings = CoreSettings(lr_scheduler="cosine", lr_warmup_steps=400_000, learning_rate=5e-5)
    sentence = str(schedule_sentence(settings, 400_000))
    assert "rises during the whole run, to 5e-05" in sentence
    assert sentence.count(". ") == 0
    assert schedule_sentence(CoreSettings(lr_warmup_steps=10), 100) is None


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_clip_by_norm_scales_and_by_value_clamps():
    p = with_gradient(3.0, -4.0)
    assert float(clip_gradients([p], limit=1.0, method="norm")) == pytest.approx(5.0)
    assert p.grad.tolist() == pytest.approx([0.6, -0.8], abs=1e-5)
    p = with_gradient(3.0, -0.1)
    assert float(clip_gradients([p], limit=0.5, method="value")) == pytest.approx(3.0)
    assert p.grad.tolist() == pytest.approx([0.5, -0.1])


@pytest.mark.parametrize("method", ["norm", "value"])
def test_limit_zero_measures_without_changing(method: str):
    p = with_gradient(3.0, -4.0)
    assert float(clip_gradients([p], limit=0.0, method=method)) in (5.0, 4.0)
    assert p.grad.tolist() == [3.0, -4.0]


@pytest.mark.parametrize(
    "name", ["adamw", "adamw_bf16", "optimi-adamw", "optimi-lion", "optimi-stableadamw"]
)
def test_every_builtin_optimizer_goes_down_on_a_parabola(name: str):
    dtype = torch.bfloat16 if name == "adamw_bf16" else torch.float32
    parameter = nn.Parameter(torch.full((4,), 2.0, dtype=dtype))
    run = SimpleNamespace(settings=CoreSettings(optimizer=name, learning_rate=0.05))
    groups = [ParameterGroup("model", [("w", parameter)])]
    optimizer = Optimizers().build_optimizer(run, groups)
    for _ in range(20):
        (parameter.float() ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(parameter.detach().float().abs().max()) < 1.5


def test_a_group_with_its_own_learning_rate_keeps_it():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    run = SimpleNamespace(settings=CoreSettings(learning_rate=0.1))
    groups = [ParameterGroup("model", [("a", first)]), ParameterGroup("x", [("b", second)], 0.5)]
    optimizer = Optimizers().build_optimizer(run, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_optimizer_config_takes_literals_only():
    assert parse_arguments("weight_decay=1e-3,betas=(0.9,0.99),foreach=False") == {
        "weight_decay": 1e-3,
        "betas": (0.9, 0.99),
        "foreach": False,
    }
    for bad in ("__import__('os')", "a=open('x')", "weight_decay 3", "**{}"):
        with pytest.raises(ValueError, match="name=value"):
            parse_arguments(bad)


def test_an_argument_that_the_optimizer_does_not_know_is_a_config_error():
    settings = CoreSettings(optimizer_config="momentum_of_doom=3")
    groups = [ParameterGroup("model", [("w", nn.Parameter(torch.ones(1)))])]
    with pytest.raises(ConfigError, match="momentum_of_doom"):
        Optimizers().build_optimizer(SimpleNamespace(settings=settings), groups)


def test_trained_weights_are_float32_unless_the_optimizer_compensates_rounding():
    pick = trained_dtype
    assert pick("adamw", model_type="lora", mixed_precision="bf16") == torch.float32
    assert pick("optimi-lion", model_type="lora", mixed_precision="bf16") == torch.float32
    assert pick("adamw", model_type="full", mixed_precision="bf16") == torch.float32
    assert pick("optimi-lion", model_type="full", mixed_precision="bf16") == torch.bfloat16
    assert pick("adamw_bf16", model_type="lora", mixed_precision="bf16") == torch.bfloat16
    with pytest.raises(ConfigError, match="mixed_precision"):
        pick("adamw_bf16", model_type="lora", mixed_precision="no")
