"""lycoris_config: what is taken, and what is refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core.errors import ConfigError
from trainer_lycoris import Lycoris
from trainer_lycoris.config import LycorisSettings
from trainer_lycoris.options import OptionsError, read_options

LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 1, "factor": 4}


def test_the_references_example_is_taken():
    content = {
        "algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 16,
        "apply_preset": {
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
        },
    }  # fmt: skip
    options = read_options(content)
    assert (options.form.algo, options.form.dim, options.form.alpha) == ("lokr", 10000, 1.0)
    assert options.preset.module_algo_map["FeedForward"].factor == 8


def test_spellings_of_one_meaning_come_together():
    one = read_options({"algo": "LoRA", "linear_dim": 4, "dora_wd": True, "wd_on_out": False})
    two = read_options({"algo": "locon", "dim": 4, "weight_decompose": True, "wd_on_output": False})
    assert one == two


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"linear_dimm": 4}, r"linear_dimm is unknown; did you mean 'linear_dim'\?"),
    ({"frob": 4}, "frob is unknown; known are "),
    ({"conv_dim": 4}, "conv_dim has no effect: convolutions are left alone"),
    ({"use_scalar": True}, "use_scalar has no effect"),
    ({"preset": "full"}, "preset has no effect: apply_preset chooses the layers"),
    ({"multiplier": 0.5}, r"multiplier is 0\.5.*change linear_alpha instead"),
    ({"algo": "boft"}, "algo 'boft' is not built; write lokr, loha, locon or full"),
    ({"algo": "lokar"}, "algo = 'lokar'"),
    ({"algo": None}, "algo is missing"),
    ({"linear_dim": 0}, "linear_dim = 0: input should be greater than or equal to 1"),
    ({"linear_dim": 2.5}, r"linear_dim = 2\.5"),
    ({"linear_dim": "4"}, "linear_dim = '4'"),
    ({"linear_alpha": -1}, "linear_alpha = -1"),
    ({"rank_dropout": 1.0}, r"rank_dropout = 1\.0"),
    ({"algo": "loha"}, "factor has no effect with algo loha; remove it"),
    ({"algo": "full"}, "factor has no effect with algo full"),
    ({"wd_on_output": False}, "wd_on_output has no effect without dora_wd"),
    ({"dora_wd": True, "dropout": 0.1}, "dropout has no effect with dora_wd"),
    ({"dora_wd": True, "bypass_mode": True}, "bypass_mode cannot go with dora_wd"),
    ({"bypass_mode": False, "dropout": 0.1}, "dropout has no effect with bypass_mode false"),
    ({"bypass_mode": True, "rank_dropout": 0.1}, "rank_dropout has no effect with bypass_mode"),
    ({"dropout": 0.1, "rank_dropout": 0.1}, "LoKr takes dropout or rank_dropout, not both"),
    ({"apply_preset": []}, r"apply_preset = \[\]"),
    ({"apply_preset": {"target_modul": []}}, r"target_modul is unknown; did you mean 'target_module'\?"),
    ({"apply_preset": {"lora_prefix": "x"}}, "lora_prefix 'x' would give names"),
    ({"apply_preset": {"enable_conv": True}}, "enable_conv has no effect"),
    (
        {"apply_preset": {"module_algo_map": {"A": {"facto": 2}}}},
        r"facto is unknown; did you mean 'factor'\?",
    ),
    (
        {"apply_preset": {"name_algo_map": {"A": {"algo": "loha", "factor": 2}}}},
        r"name_algo_map\['A'\]: factor has no effect with algo loha",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("more", "says"), WRONG, ids=lambda v: str(v)[:40])
def test_what_cannot_act_is_refused(more: dict[str, Any], says: str):
    content = {k: v for k, v in {**LOKR, **more}.items() if v is not None}
    with pytest.raises(OptionsError, match=says):
        read_options(content)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(OptionsError) as refused:
        read_options({**LOKR, "multiplier": 2, "linear_dim": 0, "facto": 3})
    assert len(refused.value.sentences) == 3


def test_a_file_is_read_with_comments_and_told_by_name(tiny: Any, tmp_path: Path):
    path = tmp_path / "lycoris_config.json"
    path.write_text("// the adapter\n" + json.dumps(LOKR)[:-1] + ",}")
    plugin = Lycoris(LycorisSettings(lycoris_config=str(path)))
    run = tiny.make_run(tmp_path)
    plugin.check(run)
    assert plugin.options == read_options(LOKR)
    path.write_text(json.dumps({**LOKR, "linear_dimm": 3}))
    plugin = Lycoris(LycorisSettings(lycoris_config=str(path)))
    with pytest.raises(ConfigError) as refused:
        plugin.check(run)
    (problem,) = refused.value.problems
    assert (problem.key, problem.value) == ("lycoris_config", str(path))
    assert "did you mean 'linear_dim'?" in problem.text
    plugin.check(tiny.make_run(tmp_path, model_type="full"))  # then nothing reads it
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must hold one object"):
        Lycoris(LycorisSettings(lycoris_config=str(path))).check(run)
    with pytest.raises(ConfigError, match=r"there is no such file \(lycoris_config\)"):
        Lycoris(LycorisSettings(lycoris_config=str(tmp_path / "gone.json"))).check(run)
