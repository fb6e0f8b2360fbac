"""Start, forward, dropout and files on a tiny real Wan transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from trainer_core.errors import CheckpointError, ModelError
from trainer_core.rng import seed_global
from trainer_core.types import Moment

FILE = "pytorch_lora_weights.safetensors"
BOTH = {"target_module": ["Attention", "FeedForward"]}
KINDS: dict[str, dict[str, Any]] = {
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4},
    "lokr whole": {"algo": "lokr", "full_matrix": True, "factor": 4, "linear_alpha": 3},
    "lokr rebuilt": {"algo": "lokr", "linear_dim": 2, "factor": 4, "bypass_mode": False},
    "lokr dora": {"algo": "lokr", "linear_dim": 2, "factor": 4, "dora_wd": True},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3},
    "loha rebuilt": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3, "bypass_mode": False},
    "locon": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3},
    "locon rebuilt": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "bypass_mode": False},
    "full": {"algo": "full"},
}


def content(kind: str, **more: Any) -> dict[str, Any]:
    return {**KINDS[kind], "apply_preset": BOTH, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_without_effect_and_only_the_adapter_trains(tiny: Any, tmp_path: Path, kind: str):
    model = tiny.stand_in()
    model.modules["teacher"] = torch.nn.Linear(2, 2)  # a role that is no trained expert
    with torch.no_grad():
        base = tiny.predict(model.modules["transformer"])
    before = torch.get_rng_state()
    _, run = tiny.set_up(tmp_path, content(kind), model)
    assert torch.equal(before, torch.get_rng_state())
    module = run.model.modules["transformer"]
    with torch.no_grad():
        start = tiny.predict(module)
    if "dora" in kind:  # a division by the norm rounds
        assert (start - base).abs().max() <= 1e-5 * base.abs().max()
    else:
        assert torch.equal(start, base)
    names = tiny.trained(module)
    assert names
    assert all(".lycoris." in name for name in names)
    assert not tiny.trained(model.modules["teacher"])
    losses = tiny.train(module)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_adds_is_the_librarys_own_forward(tiny: Any, tmp_path: Path, kind: str):
    """In float64, where its detour through the sum with W costs no digits."""
    from trainer_lycoris.adapter import Full, adapted, exact_change

    _, run = tiny.set_up(tmp_path, content(kind))
    module = run.model.modules["transformer"]
    tiny.train(module)
    for name, layer in adapted(module):
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        change = exact_change(layer)
        layer.double().eval()
        with torch.no_grad():
            base = layer.base_layer(x)
            bias = layer.lycoris.diff_b if isinstance(layer.lycoris, Full) else None
            wanted = x @ change.double().T + (0 if bias is None else bias)
            off = (layer(x) - base - wanted).abs().max()
            assert off <= 1e-5 * wanted.abs().max()
            if not isinstance(layer.lycoris, Full):
                layer.lycoris.bypass_mode = "rebuilt" not in kind and "dora" not in kind
                torch.testing.assert_close(layer.lycoris(x), layer(x), rtol=1e-9, atol=1e-12)
        assert change.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["locon rebuilt", "lokr rebuilt", "loha rebuilt", "lokr", "full"])
def test_a_small_change_survives_weights_in_bfloat16(tiny: Any, tmp_path: Path, kind: str):
    """The library adds it to W in W's dtype and subtracts W again: beside ones, thousandths vanish."""
    from trainer_lycoris.adapter import adapted

    model = tiny.stand_in()
    model.modules["transformer"].to(torch.bfloat16)
    tiny.set_up(tmp_path, content(kind), model, tiny.make_run(tmp_path, torch.bfloat16))
    _, layer = next(adapted(model.modules["transformer"]))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.lycoris.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        size = layer.change().abs().max()
        next(layer.lycoris.parameters()).mul_(1e-3 / size)
        layer.base_layer.weight.fill_(1)
        layer.base_layer.bias.zero_()
        x = torch.tensor([1.0, -1.0] * (layer.in_features // 2), dtype=torch.bfloat16)[None]
        change = layer.change().double()
        assert change.abs().max() < 2**-9
        wanted = x.double() @ change.T
        if kind == "full":
            wanted += layer.lycoris.diff_b.double()
        with torch.autocast("cpu", torch.bfloat16):
            assert not layer.base_layer(x).any()
            ours = layer(x).double()
            theirs = (
                ours if kind == "full" else layer.lycoris(x).double()
            )  # bypass_mode is off in it
    assert (ours - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    if kind != "full":
        assert (theirs - wanted).abs().max() > 0.3 * wanted.abs().max()


def test_the_start_is_a_function_of_seed_role_and_layer(tiny: Any, tmp_path: Path):
    def start(**keys: Any) -> dict[str, torch.Tensor]:
        run = tiny.make_run(tmp_path, seed=keys.pop("seed", 42))
        run.moment = keys.pop("moment", Moment(0))
        tiny.set_up(tmp_path, content("lokr", **keys), run=run)
        return tiny.trained(run.model.modules["transformer"])

    first = start()
    torch.rand(3)  # the global state plays no part
    again = start(moment=Moment(step=90, rank=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    fewer = start(apply_preset={"target_module": ["FeedForward"]})
    assert 0 < len(fewer) < len(first)
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    one = "blocks.0.attn1.to_q.lycoris.lokr_w1"
    assert not torch.equal(first[one], start(seed=43)[one])
    assert not torch.equal(first[one], first[one.replace("to_q", "to_k")])


DROPOUTS = [
    ("lokr", {"dropout": 0.5}), ("lokr", {"rank_dropout": 0.5}), ("lokr", {"module_dropout": 0.5}),
    ("loha", {"dropout": 0.5}), ("loha", {"rank_dropout": 0.5}), ("locon", {"dropout": 0.5}),
    ("locon", {"rank_dropout": 0.5}), ("locon rebuilt", {"rank_dropout": 0.5}),
    ("full", {"module_dropout": 0.5}), ("lokr dora", {"rank_dropout": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "more"), DROPOUTS, ids=lambda v: str(v)[:30])
def test_dropout_follows_the_seed_and_recomputing_gives_the_same_gradients(
    tiny: Any, tmp_path: Path, kind: str, more: dict[str, Any]
):
    gradients, outputs = [], []
    for checkpointing in (False, True):
        _, run = tiny.set_up(tmp_path, content(kind, **more))
        module = run.model.modules["transformer"]
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in tiny.trained(module).values():
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
            still = tiny.predict(module)
            assert torch.equal(still, tiny.predict(module))  # in evaluation nothing is dropped
        module.train()
        if checkpointing:
            module.enable_gradient_checkpointing()
        with torch.random.fork_rng():
            seed_global(42, 3, device=torch.device("cpu"))
            out = tiny.predict(module)
            out.square().mean().backward()
        assert not torch.equal(out, still)
        outputs.append(out)
        gradients.append({name: value.grad for name, value in tiny.trained(module).items()})
    assert torch.equal(*outputs)
    plain, recomputed = gradients
    assert any(value is not None and value.abs().max() > 0 for value in plain.values())
    for name, value in plain.items():
        both = (value, recomputed[name])
        assert both == (None, None) or torch.equal(*both), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_roles_restore_bit_for_bit(tiny: Any, tmp_path: Path, kind: str, dtype: torch.dtype):
    roles = ("transformer", "transformer_2")

    def fresh() -> Any:
        model = tiny.stand_in(*roles)
        for module in model.modules.values():
            module.to(dtype)
        return tiny.set_up(tmp_path, content(kind), model, tiny.make_run(tmp_path, dtype))

    plugin, run = fresh()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in roles:
            for value in tiny.trained(run.model.modules[role]).values():
                value.add_(torch.randn(value.shape, generator=draw))
    names = plugin.save_weights(run, tmp_path / "new")
    assert names == [FILE, "pytorch_lora_weights_transformer_2.safetensors", "lycoris_config.json"]
    assert json.loads((tmp_path / "new" / names[-1]).read_text()) == plugin.content
    other, resumed = fresh()
    assert other.load_weights(resumed, tmp_path / "new") is True
    for role in roles:
        old, new = (tiny.trained(one.model.modules[role]) for one in (run, resumed))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_file_has_the_librarys_names_and_the_config(tiny: Any, tmp_path: Path):
    plugin, run = tiny.set_up(tmp_path, content("lokr"))
    plugin.save_weights(run, tmp_path)
    tensors = load_file(tmp_path / FILE)
    layer = "lycoris_blocks_0_attn1_to_out_0"
    found = {name for name in tensors if name.startswith(layer)}
    assert found == {f"{layer}.{p}" for p in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")}
    with safe_open(tmp_path / FILE, framework="pt") as file:
        told = file.metadata()
    assert json.loads(told["lycoris_config"]) == content("lokr")
    assert {"adapter": "lokr", "rank": "2", "alpha": "1.0"}.items() <= told.items()


def damage(path: Path, name: str) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    first = next(iter(tensors))
    if name == "one value":
        tensors[first].view(-1)[0].add_(1e-4)
    elif name == "alpha":
        tensors[next(n for n in tensors if n.endswith("alpha"))].mul_(2)
    elif name == "a layer lacks":
        tensors = {n: v for n, v in tensors.items() if n.split(".")[0] != first.split(".")[0]}
    save_file(tensors, path, metadata=told)


@pytest.mark.parametrize("name", ["one value", "alpha", "a layer lacks"])
def test_reading_back_finds_damage(tiny: Any, tmp_path: Path, name: str):
    from trainer_lycoris.files import verify

    plugin, run = tiny.set_up(tmp_path, content("loha"))
    module = run.model.modules["transformer"]
    tiny.train(module, steps=1)
    plugin.save_weights(run, tmp_path)
    verify(tmp_path / FILE, module)
    damage(tmp_path / FILE, name)
    with pytest.raises(CheckpointError, match="read back"):
        verify(tmp_path / FILE, module)


def test_a_live_scale_that_the_file_does_not_tell_is_found(tiny: Any, tmp_path: Path):
    from trainer_lycoris import adapter

    plugin, run = tiny.set_up(tmp_path, content("loha"))
    module = run.model.modules["transformer"]
    tiny.train(module, steps=2)
    plugin.save_weights(run, tmp_path)
    good = (tmp_path / FILE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "alpha", lambda layer: 1.0)
        patch.setattr("trainer_lycoris.files.alpha", lambda layer: 1.0)
        with pytest.raises(
            CheckpointError, match=r"not written.*weight change of blocks.* is off by"
        ):
            plugin.save_weights(run, tmp_path)
    assert (tmp_path / FILE).read_bytes() == good


@pytest.mark.parametrize(
    ("kind", "says"),
    [("loha", "its lycoris_config is"), ("lokr whole", "has .*in the file and")],
)
def test_a_file_of_another_adapter_is_refused(tiny: Any, tmp_path: Path, kind: str, says: str):
    plugin, run = tiny.set_up(tmp_path, content("lokr"))
    plugin.save_weights(run, tmp_path)
    other, resumed = tiny.set_up(tmp_path, content(kind))
    before = {k: v.clone() for k, v in tiny.trained(resumed.model.modules["transformer"]).items()}
    with pytest.raises(CheckpointError, match=says):
        other.load_weights(resumed, tmp_path)
    after = tiny.trained(resumed.model.modules["transformer"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_and_cut_files_are_refused(tiny: Any, tmp_path: Path):
    plugin, run = tiny.set_up(tmp_path, content("lokr"))
    with pytest.raises(CheckpointError, match="holds no " + FILE):
        plugin.load_weights(run, tmp_path)
    plugin.save_weights(run, tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        plugin.load_weights(run, tmp_path)


def test_full_training_is_left_alone(tiny: Any, tmp_path: Path):
    model, run = tiny.stand_in(), tiny.make_run(tmp_path, model_type="full")
    said: list[str] = []
    run.say_once = said.append
    plugin, _ = tiny.set_up(tmp_path, "no_file.json", model, run)
    assert all(value.requires_grad for value in model.modules["transformer"].parameters())
    assert plugin.save_weights(run, tmp_path) is None
    assert plugin.load_weights(run, tmp_path) is None
    assert said == ["lycoris has no effect: model_type is full"]


def test_a_layer_that_the_forward_does_not_reach_is_refused(tiny: Any, tmp_path: Path):
    model = tiny.stand_in()
    model.networks["transformer"] = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="would learn nothing"):
        tiny.set_up(tmp_path, content("lokr"), model)
