"""What every plugin must keep to that stores frozen weights in 8 bits, as a test class.

    class TestMine(QuantiserContract):
        name = "mine"
        plugin = Mine
        int8, fp8 = "int8-mine", "fp8-mine"

        def adapter(self):
            return "lora", pytest.importorskip("trainer_lora").Lora

The rounding itself is held against closed forms, then a whole Wan transformer against its float32 self,
then the real loop over the tiny model with a LoRA on top.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from trainer_core.errors import ConfigError
from trainer_core.linear import readable, restored
from trainer_core.quantising import Quantiser, inner_tensors, quantise_linears
from trainer_core.testing.harness import Finished, attempt, train

KEYS = {"model_type": "lora", "peft_lora_target_modules": "q,k,v,out", "lora_rank": 4}
ROWS, COLUMNS = 48, 64
STEPS = {"int8": 1 / 127, "fp8": 1 / 8}
"""Distance of neighbouring values: of the row's largest magnitude, and (e4m3) of the value itself."""
PREDICTION = {"int8": 0.005, "fp8": 0.02}
"""Largest relative error of a tiny Wan's prediction."""
BFLOAT16 = {"int8": 0.02, "fp8": 0.06}
"""The same of one layer in bfloat16."""


def linear(*, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return the same layer every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(COLUMNS, ROWS).to(dtype)


def examples() -> Tensor:
    """Return inputs (2, 5, COLUMNS), the same every time."""
    return torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(4))


def rounded(layer: Any) -> Tensor:
    """Return the weight (rows, columns) that a layer computes with."""
    with torch.no_grad():
        out: Tensor = layer(torch.eye(layer.weight.shape[1])) - layer.bias
        return out.T


class QuantiserContract:
    """Subclass it and set the attributes.

    name: what runs call the plugin. plugin: its class. int8, fp8: its two precisions, as settings name
    them.
    """

    name: ClassVar[str]
    plugin: ClassVar[type[Quantiser]]
    int8: ClassVar[str]
    fp8: ClassVar[str]

    def adapter(self) -> tuple[str, type]:
        """Return name and class of a plugin that puts an adapter on top."""
        raise NotImplementedError

    @pytest.fixture(params=["int8", "fp8"])
    def width(self, request: pytest.FixtureRequest) -> str:
        """Kind of the 8 bits."""
        return str(request.param)

    @pytest.fixture
    def kind(self, width: str) -> str:
        """Name of the precision."""
        return str(getattr(self, width))

    def quantised(self, layer: nn.Linear, kind: str) -> Any:
        """Return a layer as the plugin stores it."""
        return self.plugin().quantised(layer, kind=kind)

    # --- the rounding -------------------------------------------------------------------------

    def test_the_plugin_has_these_two_kinds(self) -> None:
        assert self.plugin.kinds == (self.int8, self.fp8)
        values = {f"base_model_precision={kind}" for kind in self.plugin.kinds}
        assert values <= set(self.plugin.info.values)

    def test_a_weight_is_rounded_to_the_nearest_value_of_its_row(
        self, width: str, kind: str
    ) -> None:
        plain = linear()
        weight = plain.weight.detach().clone()
        error = (rounded(self.quantised(plain, kind)) - weight).abs()
        of = weight.abs().amax(1, keepdim=True) if width == "int8" else weight.abs()
        tiny = weight.abs().amax() * (2**-9 / 448 + 1e-5)  # subnormal values of e4m3
        assert bool((error <= of * STEPS[width] / 2 * 1.01 + tiny).all())
        assert float(error.max()) > 0

    def test_the_same_weight_gives_the_same_bits(self, kind: str) -> None:
        one, two = (self.quantised(linear(), kind) for _ in range(2))
        assert torch.equal(one(examples()), two(examples()))

    def test_the_gradient_of_the_input_is_that_of_the_rounded_weight(self, kind: str) -> None:
        layer = self.quantised(linear(), kind)
        x = examples().requires_grad_()
        layer(x).sum().backward()
        expected = rounded(layer).sum(0).expand_as(x)
        assert x.grad is not None
        assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)

    def test_a_weight_that_is_read_is_the_one_that_products_see(self, kind: str) -> None:
        root = nn.Sequential(linear())
        quantise_linears(root, lambda layer: self.quantised(layer, kind), dtype=torch.float32)
        own = readable(root[0], like=examples())
        if own is None:
            pytest.skip("its weight cannot be read, so the layer is always called")
        weight = restored(root[0].weight, torch.float32)  # type: ignore[arg-type]
        assert torch.allclose(weight, rounded(root[0]), rtol=1e-4, atol=1e-5)

    def test_bfloat16_goes_in_and_comes_out(self, width: str, kind: str) -> None:
        layer = self.quantised(linear(dtype=torch.bfloat16), kind)
        out = layer(examples().bfloat16()).detach()
        assert out.dtype == torch.bfloat16
        wanted = linear()(examples()).detach()
        assert float((out.float() - wanted).norm() / wanted.norm()) < BFLOAT16[width]

    def test_the_forward_of_wan_is_off_by_less_than_it_says(self, width: str, kind: str) -> None:
        diffusers = pytest.importorskip("diffusers")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            plain = diffusers.WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=4,
                in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
            ).eval()  # fmt: skip
            video, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 32)
        stored = copy.deepcopy(plain)
        for block in stored.blocks:
            sizes = quantise_linears(
                block, lambda layer: self.quantised(layer, kind), dtype=torch.float32
            )
            assert sizes.layers == 10
            assert sizes.after < 0.35 * sizes.before
        with torch.no_grad():
            wanted, found = (
                model(video, torch.tensor([500.0]), text, return_dict=False)[0]
                for model in (plain, stored)
            )
        error = float((found - wanted).norm() / wanted.norm())
        assert 0 < error < PREDICTION[width]

    # --- through the real loop ----------------------------------------------------------------

    def run(self, folder: Path, output: str, **keys: Any) -> Finished:
        """Train the tiny model with an adapter, and with the plugin where a key asks for it."""
        adapter, made = self.adapter()
        named = None if keys.get("base_model_precision") else [adapter]
        plugins = {self.name: self.plugin, adapter: made}
        return train(
            folder, plugins=plugins, named=named, settings={**KEYS, **keys}, output=output,
            num_held_out=2,
        )  # fmt: skip

    def refused(self, folder: Path, **keys: Any) -> str:
        """Return the error that ends a run with these keys."""
        adapter, made = self.adapter()
        plugins = {self.name: self.plugin, adapter: made}
        done = attempt(folder, plugins=plugins, settings={**KEYS, **keys})
        assert isinstance(done.error, ConfigError), done.error
        return str(done.error)

    def test_it_learns_as_the_plain_run_does(self, tmp_path: Path, kind: str) -> None:
        keys = {"max_train_steps": 20, "learning_rate": 1e-2}
        plain = self.run(tmp_path, "plain", **keys)
        stored = self.run(tmp_path, kind, **keys, base_model_precision=kind)
        assert stored.draws == plain.draws
        first, last = _held_out(stored)
        assert last < first, "the held-out loss falls"
        gain = _held_out(plain)[0] - _held_out(plain)[1]
        assert first - last > 0.8 * gain, "and by about as much"

    def test_every_linear_layer_of_the_blocks_is_stored_so_and_no_other(
        self, tmp_path: Path, kind: str
    ) -> None:
        done = self.run(tmp_path, "output", base_model_precision=kind, max_train_steps=1)
        assert any(f"blocks in {kind}: 24 layers, " in line for line in done.said)

    def test_adapters_and_what_lies_outside_of_blocks_stay_as_they_are(
        self, tmp_path: Path
    ) -> None:
        seen: list[Any] = []

        class Watch(self.plugin):  # type: ignore[name-defined,misc]  # the class under test
            def attach(self, run: Any) -> None:
                seen.append(run.model)

        adapter, made = self.adapter()
        plugins = {self.name: Watch, adapter: made}
        train(tmp_path, plugins=plugins, settings={**KEYS, "base_model_precision": self.int8})
        network = seen[0].modules["transformer"]
        for name, parameter in network.named_parameters():
            weight = name.startswith("blocks.") and name.endswith(".weight")
            weight = weight and "lora_" not in name and "norm" not in name
            assert bool(inner_tensors(parameter)) == weight, name
            assert parameter.requires_grad == ("lora_" in name)
        assert isinstance(network.head, nn.Linear)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_checkpointing_changes_no_bit(self, tmp_path: Path, checkpointing: bool) -> None:
        keys = {"base_model_precision": self.int8, "gradient_checkpointing": checkpointing}
        plain = self.run(tmp_path, "plain", base_model_precision=self.int8)
        assert self.run(tmp_path, "output", **keys).weights() == plain.weights()

    def test_where_it_is_quantised_changes_nothing_on_one_device(self, tmp_path: Path) -> None:
        keys = {"base_model_precision": self.int8}
        runs = [self.run(tmp_path, via, **keys, quantize_via=via) for via in ("cpu", "accelerator")]
        assert runs[0].steps == runs[1].steps  # the files also tell the settings

    def test_weights_that_are_trained_are_refused(self, tmp_path: Path) -> None:
        text = self.refused(
            tmp_path, base_model_precision=self.int8, model_type="full",
            peft_lora_target_modules="q", plugins=[self.name, "tiny"], model_family="tiny",
        )  # fmt: skip
        assert "trains all of them" in text
        assert "set model_type to lora" in text

    def test_bfloat16_around_it_needs_products_in_bfloat16(self, tmp_path: Path) -> None:
        keys = {"base_model_precision": self.int8, "base_model_default_dtype": "bf16"}
        text = self.refused(tmp_path, **keys)
        assert "base_model_default_dtype" in text
        assert "needs mixed_precision bf16" in text

    def test_an_encoder_that_nobody_can_store_so_is_refused(self, tmp_path: Path) -> None:
        keys = {"base_model_precision": self.int8, "text_encoder_1_precision": self.int8}
        assert "no text encoder of this run" in self.refused(tmp_path, **keys)

    def test_nothing_of_torchs_state_is_left_changed(self, tmp_path: Path) -> None:
        before = torch.get_rng_state(), torch.get_default_dtype()
        self.run(tmp_path, "output", base_model_precision=self.int8, max_train_steps=1)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.get_default_dtype() == before[1]


def _held_out(done: Finished) -> list[float]:
    return [event["eval/eval"] for event in done.events if event["kind"] == "eval"]
