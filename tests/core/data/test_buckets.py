from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_core.data.buckets import (
    aspect_size,
    crop_plan,
    native_hint,
    native_hints,
    resized,
    target_size,
    too_small,
    trims,
    whole_size,
)
from trainer_core.types import Expert, ModelSpec

WAN = ModelSpec(
    name="toy", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),), sizes=((832, 480), (480, 832)),
)  # fmt: skip


EDGES = st.integers(96, 4000)


def size(width, height, resolution, *, kind="pixel_area", alignment=16, rounding=2):
    return whole_size(
        width, height, resolution=resolution, kind=kind, alignment=alignment, rounding=rounding
    )


@pytest.mark.parametrize("edge", [480, 512, 624, 720, 960])
def test_squares_are_exact(edge):
    assert size(500, 500, edge) == (edge, edge)
    assert aspect_size(1.0, resolution=edge, kind="pixel_area", alignment=16) == (edge, edge)


def test_the_native_sizes_are_reached():
    assert size(832, 480, 632) == (832, 480)
    assert size(480, 832, 632) == (480, 832)
    assert size(832, 480, 0.4, kind="area") == (832, 480)
    assert size(832, 480, 480, kind="pixel") == (832, 480)
    assert size(1280, 704, 0.9011, kind="area", alignment=32) == (1280, 704)
    assert aspect_size(832 / 480, resolution=632, kind="pixel_area", alignment=16) == (832, 480)


@given(EDGES, EDGES, st.sampled_from([240, 480, 632, 720, 960]), st.sampled_from([16, 32]))
def test_less_than_one_alignment_step_is_trimmed_and_nothing_distorted(w, h, resolution, step):
    if max(w / h, h / w) > 8:
        return
    got = size(w, h, resolution, alignment=step)
    assert got[0] % step == got[1] % step == 0
    assert max(trims((w, h), got)) < step
    # the nearest area that the grid allows: one step on the shorter edge
    assert got[0] * got[1] == pytest.approx(resolution**2, rel=2 * step / min(got))


@given(EDGES, EDGES, st.booleans(), st.sampled_from(["square", "preserve", "closest", "random"]))
def test_one_resize_covers_the_target_and_keeps_the_aspect(dataset, w, h, crop, aspect):
    data = replace(
        dataset, crop=crop, crop_aspect=aspect if crop else "preserve", resolution=480,
        crop_style="random", crop_aspects=(1.0, 1.78, 0.56),
    )  # fmt: skip
    target = target_size(w, h, data, WAN, draw=lambda options: options - 1)
    whole = resized(w, h, target, data)
    assert whole[0] >= target[0]
    assert whole[1] >= target[1]
    assert abs(whole[0] / w - whole[1] / h) <= 1 / min(w, h)
    for draw in (lambda options: 0, lambda options: options - 1):
        plan = crop_plan(whole, target, data.crop_style, draw=draw)
        assert 0 <= plan.left <= whole[0] - plan.width
        assert 0 <= plan.top <= whole[1] - plan.height


def test_downsampling_crops_tighter(dataset):
    data = replace(
        dataset, crop=True, crop_aspect="square", resolution=256, maximum_size=900,
        downsample_size=640,
    )  # fmt: skip
    assert resized(800, 800, (256, 256), data) == (256, 256)
    assert resized(1000, 1000, (256, 256), data) == (640, 640)


def test_crop_styles():
    assert crop_plan((100, 80), (64, 64), "center", draw=lambda n: 0).left == 18
    corner = crop_plan((100, 80), (64, 64), "corner", draw=lambda n: 9)
    assert (corner.left, corner.top) == (0, 0)


def test_closest_takes_the_models_sizes(dataset):
    data = replace(dataset, crop=True, crop_aspect="closest", resolution=632)
    assert target_size(1280, 720, data, WAN, draw=lambda n: 0) == (832, 480)
    assert target_size(600, 800, data, WAN, draw=lambda n: 0) == (480, 832)


def test_the_minimum_size_counts_in_the_unit_of_resolution(dataset):
    data = replace(dataset, minimum_size=480)
    assert not too_small(640, 360, data)
    assert too_small(639, 360, data) == "639x360 is below minimum_image_size 480 (pixel_area)"
    assert too_small(640, 360, replace(data, resolution_type="pixel"))
    assert too_small(640, 360, replace(data, crop=True, crop_aspect="square"))
    assert too_small(640, 360, replace(data, resolution_type="area", minimum_size=0.24))
    assert not too_small(2, 2, replace(data, minimum_size=0))


def test_a_foreign_size_names_the_resolution_that_gives_a_native_one(dataset):
    assert native_hint((832, 480), [(832, 480)], dataset, WAN) == ""
    hint = native_hint((624, 368), [(832, 480)], dataset, WAN)
    assert "resolution 632 gives 832x480" in hint
    hint = native_hint((640, 368), [(1280, 720)], dataset, WAN)
    assert "resolution 632 with crop: true and crop_aspect: closest gives 832x480" in hint


def test_foreign_sizes_of_a_dataset_make_one_sentence(dataset):
    wide, tall = [(1280, 720)] * 3, [(720, 1280)]
    hint = native_hints({(640, 368): wide, (368, 640): tall, (832, 480): wide}, dataset, WAN)
    assert hint.startswith("640x368, 368x640 are not sizes the model was trained at; ")
    assert hint.count("resolution") == 1
    assert native_hints({(832, 480): wide}, dataset, WAN) == ""
    both = native_hints({(624, 368): [(832, 480)], (640, 368): wide}, dataset, WAN)
    assert "for most of its files, resolution 632 with crop: true" in both
