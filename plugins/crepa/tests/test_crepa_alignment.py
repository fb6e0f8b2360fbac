"""The alignment against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from trainer_crepa.alignment import Projector, neighbours, on_grid, score

E = math.exp(-1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(teacher: torch.Tensor) -> torch.Tensor:
    """Features (B, T, h, w, C) as tokens (B, N, C)."""
    return teacher.flatten(1, 3)


def adjacent(distance: int, tau: float = 1.0):
    return neighbours(distance, tau, cumulative=False)


def test_without_neighbours_it_is_the_mean_cosine():
    """O-C1: REPA*; tau towards 0 and a single frame give the same."""
    p, y = draw(2, 3 * 6, 5), draw(2, 3, 2, 3, 5, seed=1)
    expected = torch.nn.functional.cosine_similarity(p, flat(y), dim=-1).mean(1)
    for weights in (adjacent(0), adjacent(1, 1e-4), adjacent(7)):
        found = score(p, y, weights)
        torch.testing.assert_close(found.value, expected)
        torch.testing.assert_close(found.similarity, expected)
    one = score(p[:, :6], y[:, :1], adjacent(1))
    torch.testing.assert_close(
        one.value, torch.nn.functional.cosine_similarity(p[:, :6], flat(y[:, :1]), dim=-1).mean(1)
    )


@pytest.mark.parametrize(
    ("frames", "distance", "cumulative", "expected"),
    [
        (4, 1, False, 1.551819), (19, 1, False, 1.697035), (19, 2, False, 1.242179),
        (19, 3, True, 2.023066), (3, 5, False, 1.0), (1, 1, False, 1.0),
    ],
)  # fmt: skip
def test_equal_features_give_the_number_of_neighbours(frames, distance, cumulative, expected):
    """O-C2; a distance beyond the clip has no neighbour, rather than the last frame."""
    y = draw(1, 1, 2, 2, 8).expand(1, frames, 2, 2, 8)
    weights = neighbours(distance, 1.0, cumulative=cumulative)
    found = score(flat(y), y, weights)
    assert float(found.value) == pytest.approx(expected, abs=2e-6)
    assert float(found.normalised) == pytest.approx(1, abs=1e-6)
    divided = score(flat(y), y, weights, normalise=True)
    assert float(divided.value) == pytest.approx(1, abs=1e-6)


def test_orthogonal_frames():
    """O-C3: neighbours add nothing; a student that shows the next frame gets the neighbour's weight."""
    y = torch.eye(5).view(1, 5, 1, 1, 5).expand(1, 5, 2, 2, 5)
    for distance in (1, 2, 3):
        assert float(score(flat(y), y, adjacent(distance)).value) == pytest.approx(1, abs=1e-6)
    ahead = y.roll(-2, dims=1)
    found = score(flat(ahead), y, {k: w for k, w in adjacent(2).items() if k >= 0})
    wraps = 0.0  # frames 3 and 4 show frames 0 and 1, which are not their neighbours
    assert float(found.value) == pytest.approx((5 - 2) / 5 * math.exp(-2) + wraps, abs=1e-6)


def test_what_does_not_matter():
    """O-C4."""
    p, y, weights = draw(2, 4 * 6, 5), draw(2, 4, 2, 3, 5, seed=1), adjacent(1, 2.0)
    base = score(p, y, weights).value
    torch.testing.assert_close(score(3 * p, 0.2 * y, weights).value, base)
    torch.testing.assert_close(score(-p, y, weights).value, -base)
    back = p.unflatten(1, (4, 6)).flip(1).flatten(1, 2)
    torch.testing.assert_close(score(back, y.flip(1), weights).value, base)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    mixed = y.flatten(2, 3)[:, :, order].unflatten(2, (2, 3))
    again = p.unflatten(1, (4, 6))[:, :, order].flatten(1, 2)
    torch.testing.assert_close(score(again, mixed, weights).value, base)
    torch.testing.assert_close(score(p, y, weights, mean_over_frames=False).value, 4 * base)
    alone = torch.cat([score(p[k : k + 1], y[k : k + 1], weights).value for k in range(2)])
    torch.testing.assert_close(alone, base)


def test_the_gradient_has_no_part_along_the_token():
    """O-C5: a cosine knows no length; nothing flows to the teacher."""
    p, y = draw(1, 12, 5).double().requires_grad_(), draw(1, 2, 2, 3, 5, seed=1).double()
    score(p, y, adjacent(1)).value.sum().backward()
    assert (p.grad * p).sum(-1).abs().max() < 1e-7
    assert p.grad.abs().max() > 1e-3
    assert not y.requires_grad


def test_kept_tokens_against_the_definition():
    """Means over the kept tokens of each frame, one by one; a frame without any is left out."""
    teacher = draw(2, 4, 2, 3, 5, seed=1)
    kept = [
        [0, 2, 5, 7, 18, 23],
        [6, 7, 8, 12, 13, 14],
    ]  # frames 0, 0, 0, 1, 3, 3 and 1, 1, 1, 2, 2, 2
    ids, p = torch.tensor(kept), draw(2, 6, 5)
    found = score(p, teacher, adjacent(1, 2.0), ids=ids)
    for sample in range(2):
        frames = []
        for f in range(4):
            own = [k for k, i in enumerate(kept[sample]) if i // 6 == f]
            if not own:
                continue
            total = 0.0
            for offset, weight in adjacent(1, 2.0).items():
                if not 0 <= f + offset < 4:
                    continue
                cosines = [
                    torch.nn.functional.cosine_similarity(
                        p[sample, k],
                        teacher[sample, f + offset].flatten(0, 1)[kept[sample][k] % 6],
                        dim=0,
                    )
                    for k in own
                ]
                total += weight * float(sum(cosines)) / len(own)
            frames.append(total)
        expected = sum(frames) / len(frames)
        assert float(found.value[sample]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("by_token", [True, False])
def test_all_tokens_kept_is_the_full_form_bit_for_bit(by_token):
    p, y = draw(2, 24, 5), draw(2, 4, 2, 3, 5, seed=1)
    ids = torch.arange(24).expand(2, 24)
    for weights in (adjacent(1), neighbours(2, 1.5, cumulative=True)):
        full = score(p, y, weights, by_token=by_token)
        same = score(p, y, weights, ids=ids, by_token=by_token)
        assert torch.equal(full.value, same.value)
        assert torch.equal(full.similarity, same.similarity)


def test_frame_means_are_compared_without_spatial_alignment():
    p, y = draw(1, 12, 5), draw(1, 2, 2, 3, 5, seed=1)
    found = score(p, y, adjacent(0), by_token=False)
    means = p.unflatten(1, (2, 6)).mean(2)
    expected = torch.nn.functional.cosine_similarity(means, y.flatten(2, 3).mean(2), dim=-1).mean(1)
    torch.testing.assert_close(found.value, expected)
    ids = torch.tensor([[1, 3, 4, 5]])  # the second frame has none
    kept = score(p[:, ids[0]], y, adjacent(0), ids=ids, by_token=False)
    mean = p[:, ids[0]].mean(1)
    own = y[:, 0].flatten(1, 2).mean(1)
    torch.testing.assert_close(kept.value, torch.nn.functional.cosine_similarity(mean, own, dim=-1))


@pytest.mark.parametrize(("h", "w"), [(37, 37), (28, 49), (60, 104)])
def test_a_grid_keeps_its_places_in_two_dimensions(h, w):
    """O-C6: linear ramps over rows and columns stay ramps, to less than half a patch."""
    rows = ((torch.arange(h) + 0.5) / h).view(h, 1).expand(h, w)
    columns = ((torch.arange(w) + 0.5) / w).view(1, w).expand(h, w)
    found = on_grid(torch.stack([rows, columns], dim=-1), 30, 52)
    y = ((torch.arange(30) + 0.5) / 30).view(30, 1).expand(30, 52)
    x = ((torch.arange(52) + 0.5) / 52).view(1, 52).expand(30, 52)
    assert (found[..., 0] - y).abs().max() < 0.5 / min(h, 30)
    assert (found[..., 1] - x).abs().max() < 0.5 / min(w, 52)
    assert (found[..., 0] - y).abs().mean() <= 2e-3
    in_a_row = torch.nn.functional.interpolate(
        columns.reshape(1, 1, -1), 30 * 52, mode="linear"
    ).view(30, 52)
    if (h, w) == (37, 37):  # what resampling the flattened grid would do
        assert (in_a_row - x).abs().mean() > 0.3


def test_the_same_grid_is_left_alone():
    y = draw(2, 3, 4, 5, 6)
    assert torch.equal(on_grid(y, 4, 5), y)


def test_the_projector_is_a_norm_and_a_linear_layer():
    projector = Projector(6, 4)
    tokens = draw(2, 3, 6).bfloat16()
    expected = torch.nn.functional.layer_norm(tokens.float(), (6,)) @ projector.linear.weight.T
    torch.testing.assert_close(projector(tokens), expected + projector.linear.bias)


def test_neighbour_weights():
    assert adjacent(0) == {0: 1.0}
    assert adjacent(2) == {0: 1.0, 2: pytest.approx(E**2), -2: pytest.approx(E**2)}
    both = neighbours(2, 2.0, cumulative=True)
    assert both == {
        0: 1.0, 1: pytest.approx(E**0.5), -1: pytest.approx(E**0.5), 2: pytest.approx(E),
        -2: pytest.approx(E),
    }  # fmt: skip


def test_the_similarity_told_is_that_with_the_own_frame():
    draw = torch.Generator().manual_seed(3)
    p = torch.randn(2, 3 * 4, 8, generator=draw)
    y = torch.randn(2, 3, 2, 2, 8, generator=draw)
    alone = score(p, y, {0: 1.0})
    together = score(p, y, neighbours(2, 1.0, cumulative=True))
    assert torch.equal(together.similarity, alone.value)
    assert not torch.allclose(together.value, alone.value)


def test_a_coarser_grid_averages():
    y = torch.zeros(1, 8, 8, 1)
    y[:, :, ::4] = 1
    coarse = on_grid(y, 2, 2)
    assert torch.allclose(coarse, torch.full_like(coarse, 0.25), atol=0.1), (
        "a place between two samples would be 0"
    )
