"""Kernels by name: refused where they cannot train, used where they should be, put back afterwards."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from trainer_core.errors import ConfigError
from trainer_core.types import ForwardPlan, Prompt
from trainer_wan import Wan, attention
from trainer_wan.config import WanSettings

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
SAGE = AttentionBackendName("sage")


def loaded(make_run, mechanism, **keys):
    plugin, run = Wan(WanSettings(attention_mechanism=mechanism)), make_run(**keys)
    plugin.check(run)
    run.spec = plugin.describe_model(run)
    run.model = plugin.load_model(run)
    return plugin, run


@pytest.mark.parametrize(
    ("mechanism", "package"),
    [("flash-attn-2", "flash-attn"), ("flash-attn-3", "flash_attn_3"), ("xformers", "xformers")],
)
def test_a_kernel_that_is_not_installed_is_refused_with_its_package(
    make_run, monkeypatch, mechanism, package
):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"attention_mechanism = '{mechanism}'.*{package}"):
        Wan(WanSettings(attention_mechanism=mechanism)).check(make_run())


def test_flex_has_no_backward_on_the_cpu_and_is_refused_before_training(make_run):
    with pytest.raises(ConfigError, match="attention_mechanism = 'flex': cannot train here"):
        loaded(make_run, "flex")


@pytest.mark.parametrize("broken", ["zero", "nan", "none"])
def test_a_kernel_without_a_gradient_is_found_out(monkeypatch, broken):
    def kernel(query, key, value):
        out = F.scaled_dot_product_attention(query, key, value)
        return {"zero": out * 0, "nan": out * float("nan"), "none": out.detach()}[broken]

    monkeypatch.setitem(_AttentionBackendRegistry._backends, SAGE, kernel)
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names, SAGE, {"query", "key", "value"}
    )
    assert attention.failure(attention.Kernel("sage"), head=24, **CPU)
    assert attention.failure(attention.KERNELS["native-math"], head=24, **CPU) is None


def backends(run) -> set:
    found = attention._processors(run.model.modules["transformer"])
    assert len(found) == 6
    return {processor._attention_backend for processor in found}


def test_a_kernel_that_trains_is_the_one_that_computes(make_run, make_inputs, monkeypatch):
    _, plain = loaded(make_run, "diffusers")
    expected, _ = plain.model.predict(make_inputs(), ForwardPlan())
    assert backends(plain) == {None}
    _, run = loaded(make_run, "native-math")
    assert backends(run) == {AttentionBackendName("_native_math")}
    calls = Counter()
    real = _AttentionBackendRegistry._backends[AttentionBackendName("_native_math")]

    def counting(**given):
        calls["math"] += 1
        return real(**given)

    name = AttentionBackendName("_native_math")
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counting)
    found, _ = run.model.predict(make_inputs(), ForwardPlan())
    assert calls["math"] == 6
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.fixture
def rendering(make_run):
    keys = {
        "validation_num_inference_steps": 1,
        "validation_num_video_frames": 5,
        "validation_resolution": "32x32",
        "validation_guidance": 1.0,
    }

    def make():
        plugin, run = loaded(make_run, "sageattention", **keys)
        run.prompts = (Prompt("a", "a"),)
        run.set_captions(lambda _: {"text_embeds": torch.zeros(4, 32)})
        return plugin, run

    return make


def test_sage_attention_draws_samples_and_nothing_else(rendering, make_inputs, monkeypatch):
    calls = Counter()

    def kernel(query, key, value):
        calls["sage"] += 1
        assert not torch.is_grad_enabled()
        tensors = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*tensors).transpose(1, 2)

    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setitem(_AttentionBackendRegistry._backends, SAGE, kernel)
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names, SAGE, {"query", "key", "value"}
    )
    plugin, run = rendering()
    assert backends(run) == {None}
    run.model.predict(make_inputs(), ForwardPlan())
    assert calls["sage"] == 0
    plugin.validate(run)
    assert calls["sage"] == 1 + 6  # a look at whether it computes, then two in each of three blocks
    assert backends(run) == {None}
    assert run.said == []
    monkeypatch.setattr("trainer_wan.validation.sample_latents", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugin.validate(run)
    assert backends(run) == {None}


@pytest.mark.parametrize(
    ("present", "words"), [(False, "is not installed"), (True, "cannot compute here")]
)
def test_without_a_usable_sage_attention_samples_are_drawn_all_the_same(
    rendering, monkeypatch, present, words
):
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if present else None)
    if present:
        monkeypatch.setitem(_AttentionBackendRegistry._backends, SAGE, lambda **given: 1 / 0)
    plugin, run = rendering()
    for _ in range(2):
        assert len(plugin.validate(run)) == 1
    assert len(run.said) == 1
    assert words in run.said[0]
