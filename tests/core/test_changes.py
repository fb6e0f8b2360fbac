"""The formulas of the papers, entry by entry, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from trainer_core.changes import bias_change, by_layer, largest_error, weight_change
from trainer_core.errors import CheckpointError

OUT, IN, RANK = 6, 8, 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(OUT, IN, seed=9)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the digits of float32, which changes without DoRA are compared in."""
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def entries(of, out: int = OUT, into: int = IN) -> torch.Tensor:
    rows = [[float(of(i, j)) for j in range(into)] for i in range(out)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "names", [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")]
)
def test_lora_is_alpha_over_rank_times_the_product(names):
    down, up = draw(RANK, IN, seed=1), draw(OUT, RANK, seed=2)
    layer = {names[0]: down, names[1]: up, "alpha": torch.tensor(6.0)}
    wanted = entries(
        lambda i, j: 3 * sum(up[i, r].double() * down[r, j].double() for r in range(RANK))
    )
    close(weight_change(layer, WEIGHT), wanted)
    layer.pop("alpha")
    close(weight_change(layer, WEIGHT), wanted / 3)


def test_loha_is_the_entrywise_product_of_two_of_them():
    w = {f"hada_w{n}_{s}": draw(*shape, seed=ord(s) + n) for n in (1, 2)
         for s, shape in (("a", (OUT, RANK)), ("b", (RANK, IN)))}  # fmt: skip

    def low_rank(n: int, i: int, j: int) -> float:
        a, b = w[f"hada_w{n}_a"].double(), w[f"hada_w{n}_b"].double()
        return float(sum(a[i, r] * b[r, j] for r in range(RANK)))

    wanted = entries(lambda i, j: 0.5 * low_rank(1, i, j) * low_rank(2, i, j))
    layer = {**w, "alpha": torch.tensor(1.0)}
    close(weight_change(layer, WEIGHT), wanted)


def test_lokr_is_the_kronecker_product_and_whole_matrices_have_no_scale():
    w1, w2 = draw(2, 4, seed=3), draw(3, 2, seed=4)
    wanted = entries(lambda i, j: w1[i // 3, j // 2].double() * w2[i % 3, j % 2].double())
    whole = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}
    close(weight_change(whole, WEIGHT), wanted)
    a, b = draw(3, 1, seed=5), draw(1, 2, seed=6)
    split = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(7.0)}
    product = a.double() @ b.double()
    wanted = entries(lambda i, j: 7 * w1[i // 3, j // 2].double() * product[i % 3, j % 2])
    close(weight_change(split, WEIGHT), wanted)


@pytest.mark.parametrize("along", [1, 0])
def test_dora_gives_each_row_or_column_of_the_sum_its_length(along: int):
    down, up = draw(RANK, IN, seed=1), draw(OUT, RANK, seed=2)
    shape = (OUT, 1) if along else (1, IN)
    lengths = draw(*shape, seed=5).abs()
    layer = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths}
    changed = WEIGHT.double() + weight_change(layer, WEIGHT)
    norms = changed.norm(dim=along, keepdim=True)
    torch.testing.assert_close(norms, lengths.double(), rtol=1e-12, atol=0)
    direction = WEIGHT.double() + up.double() @ down.double()
    cosines = torch.nn.functional.cosine_similarity(changed, direction, dim=along)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-12, atol=0)


def test_full_changes_are_what_they_are():
    layer = {"diff": draw(OUT, IN), "diff_b": draw(OUT)}
    assert torch.equal(weight_change(layer, WEIGHT), layer["diff"])
    assert torch.equal(bias_change(layer), layer["diff_b"])
    assert bias_change({"diff": layer["diff"]}) is None


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"lokr_w1": draw(2, 4), "lokr_w2_a": draw(3, 1)}, "no whole adapter"),
        ({"hada_w1_a": draw(OUT, 1)}, "no whole adapter"),
        ({"diff": draw(OUT, IN), "dora_scale": draw(3, 1)}, "dora_scale has shape"),
    ],
)
def test_half_an_adapter_is_refused(layer, says: str):
    with pytest.raises(CheckpointError, match=says):
        weight_change(layer, WEIGHT)


def test_names_are_taken_apart():
    names = ("m.blocks.0.q.lokr_w1", "m.blocks.0.q.lokr_w2_a", "m.x.alpha", "m.x.lora_up.weight")
    found = by_layer({name: torch.zeros(1) for name in names}, prefix="m.")
    assert {layer: set(parts) for layer, parts in found.items()} == {
        "blocks.0.q": {"lokr_w1", "lokr_w2_a"},
        "x": {"alpha", "lora_up.weight"},
    }
    for odd in ("m.x.weight", "n.x.alpha"):
        with pytest.raises(CheckpointError, match=odd):
            by_layer({odd: torch.zeros(1)}, prefix="m.")


def test_the_largest_error_is_relative_to_each_layer_and_never_hides_one():
    one, none = torch.ones(2), torch.zeros(2)
    assert largest_error([("a", none, none), ("b", one, one)]) == (0.0, "")
    error, layer = largest_error([("a", 100 * one, 101 * one), ("b", one, 1.5 * one)])
    assert (error, layer) == (0.5, "b")
    for theirs in (torch.tensor([math.nan, 1]), torch.tensor([math.inf, 1])):
        assert largest_error([("a", one, theirs), ("b", one, one)]) == (math.inf, "a")
    assert largest_error([("a", none, one)]) == (math.inf, "a")
