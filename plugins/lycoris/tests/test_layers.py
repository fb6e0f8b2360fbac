"""Which layers are adapted, and how: as the library chooses them, or refused with the near name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer_lycoris.layers import choose
from trainer_lycoris.options import OptionsError, read_options

PRESETS: dict[str, dict[str, Any]] = {
    "classes": {"target_module": ["WanAttention", "FeedForward"]},
    "one class": {"target_module": ["FeedForward"]},
    "class forms": {
        "module_algo_map": {"WanAttention": {"dim": 2}, "FeedForward": {"algo": "loha", "dim": 3}}
    },
    "names": {"target_module": [], "target_name": [r".*attn1\.to_[qk]$"]},
    "shell-like": {"target_module": [], "target_name": ["*.attn2.to_v"], "use_fnmatch": True},
    "name forms": {"target_module": [], "name_algo_map": {r".*attn2\.to_k$": {"dim": 5}}},
    "left out": {"target_module": ["WanAttention"], "exclude_name": [r"blocks\.1\..*"]},
    "inner class": {
        "target_module": ["WanTransformerBlock"],
        "module_algo_map": {"FeedForward": {"dim": 3}},
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_library_chooses_the_same_layers_and_forms(
    tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    from lycoris import LycorisNetwork, create_lycoris

    for key in ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "MODULE_ALGO_MAP", "NAME_ALGO_MAP",
                "USE_FNMATCH", "TARGET_EXCLUDE_NAME", "ENABLE_CONV"):  # fmt: skip
        monkeypatch.setattr(LycorisNetwork, key, getattr(LycorisNetwork, key))
    module = tiny.transformer()
    preset = {"target_module": [], "target_name": [], **PRESETS[name]}
    LycorisNetwork.apply_preset(preset)
    with torch.random.fork_rng():
        network = create_lycoris(module, 1.0, linear_dim=4, linear_alpha=1, algo="locon")
    theirs = {lora.lora_name: (type(lora).__name__, lora.lora_dim) for lora in network.loras}
    options = read_options({"algo": "locon", "linear_dim": 4, "apply_preset": PRESETS[name]})
    kinds = {"locon": "LoConModule", "loha": "LohaModule"}
    ours = {
        f"lycoris_{layer}".replace(".", "_"): (kinds[str(form.algo)], form.rank)
        for layer, form in choose(module, options).items()
    }
    assert ours == theirs
    assert ours


def test_without_a_preset_every_linear_layer_is(tiny: Any):
    module = tiny.transformer()
    linear = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert list(choose(module, read_options({"algo": "full"}))) == linear
    assert "condition_embedder.time_proj" in linear


def test_a_short_name_stands_for_the_classes_that_end_with_it(tiny: Any):
    module = tiny.transformer()
    short, full = (
        choose(module, read_options({"algo": "locon", "apply_preset": {"target_module": [name]}}))
        for name in ("Attention", "WanAttention")
    )
    assert list(short) == list(full)
    assert len(full) == 16


def test_a_names_form_wins_over_its_classes(tiny: Any):
    preset = {
        "module_algo_map": {"WanAttention": {"dim": 2}},
        "name_algo_map": {r".*to_k": {"dim": 3}, r"blocks\.0\.attn1\.to_k": {"dim": 5}},
    }
    content = {"algo": "locon", "linear_dim": 9, "apply_preset": preset}
    ranks = {n: f.rank for n, f in choose(tiny.transformer(), read_options(content)).items()}
    assert ranks["blocks.0.attn1.to_k"] == 5
    assert ranks["blocks.1.attn1.to_k"] == 3
    assert ranks["blocks.1.attn1.to_q"] == 2
    assert 9 not in ranks.values()


def test_loras_own_values_do_not_reach_a_layer_of_another_kind(tiny: Any):
    preset = {"module_algo_map": {"FeedForward": {"algo": "loha"}, "WanAttention": {}}}
    content = {"algo": "lokr", "factor": 4, "linear_dim": 2, "apply_preset": preset}
    forms = choose(tiny.transformer(), read_options(content))
    assert forms["blocks.0.ffn.net.2"].factor is None
    assert forms["blocks.0.attn1.to_q"].factor == 4


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ({"target_module": ["WanAttentoin"]}, r"'WanAttentoin'; did you mean 'WanAttention'\?"),
        ({"module_algo_map": {"Nothing": {}}}, "'Nothing'; there are .*WanAttention"),
        (
            {"target_name": ["to_q"]},
            r"'to_q' matches no linear layer; layers are condition_embedder",
        ),
        ({"name_algo_map": {"x": {}}}, "'x' matches no linear layer"),
        ({"exclude_name": ["x"]}, "'x' matches no linear layer"),
        ({"target_name": ["("]}, r"'\(' is no regular expression"),
        ({"exclude_name": [".*"]}, "leaves no linear layer"),
    ],
)
def test_a_preset_that_names_nothing_is_refused(tiny: Any, preset: dict[str, Any], says: str):
    with pytest.raises(OptionsError, match=says):
        choose(tiny.transformer(), read_options({"algo": "locon", "apply_preset": preset}))
