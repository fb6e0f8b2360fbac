from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_core.data.frames import (
    Refusal,
    clip_length,
    effective_rate,
    frames_at,
    lengths_of,
    starts,
    targets,
)
from trainer_core.data.types import FramePlan, Probe
from trainer_core.types import Expert, ModelSpec

SPEC = ModelSpec(
    name="toy", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),), 
)  # fmt: skip


RATES = st.sampled_from(
    [Fraction(n) for n in (8, 12, 16, 24, 25, 30, 60)] + [Fraction(30000, 1001)]
)


def video(frames: int, rate: object) -> Probe:
    return Probe("video", frames, Fraction(rate), 64, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "kept"), [(75, 73), (77, 77), (81, 81), (1, 1), (4, 1), (80, 77)]
)
def test_counts_snap_down_and_say_so(dataset, asked, kept):
    lengths = lengths_of(replace(dataset, num_frames=asked), SPEC)
    assert lengths.fixed == kept
    assert lengths.note == ("" if asked == kept else f"{asked} -> {kept} frames")


def test_without_a_count_a_clip_has_five_seconds_at_the_models_rate(dataset):
    assert lengths_of(dataset, SPEC).fixed == 81
    assert lengths_of(dataset, replace(SPEC, fps=24)).fixed == 121


def test_min_and_max_frames_count_at_the_rate_of_training(dataset):
    lengths = lengths_of(replace(dataset, num_frames=17, min_frames=33, max_frames=40), SPEC)
    assert isinstance(clip_length(32, lengths, SPEC), Refusal)
    assert clip_length(33, lengths, SPEC) == 17
    assert clip_length(40, lengths, SPEC) == 17
    assert "max_frames is 40" in clip_length(41, lengths, SPEC).reason


def test_resolution_frames_rounds_to_the_interval_then_to_the_model(dataset):
    lengths = lengths_of(
        replace(dataset, bucket_strategy="resolution_frames", frame_interval=10, max_frames=60),
        SPEC,
    )
    assert [clip_length(n, lengths, SPEC) for n in (60, 47, 9, 1)] == [57, 37, 9, 1]


@given(RATES, RATES, st.integers(1, 400), st.integers(0, 200))
def test_frames_by_time_are_distinct_ascending_and_near(source, wanted, count, offset):
    """The plan and the time stamps agree on how many frames there are, to the frame."""
    rate = effective_rate(source, wanted)
    probe = video(count, source)
    base = Fraction(1, 90000)
    pts = [offset + round(k / source / base) for k in range(count)]
    available = frames_at(probe, rate)
    found = targets(pts, FramePlan(0, available, rate), time_base=base, slack=1 / source / 2)
    assert len(found) == available
    assert found == sorted(set(found))
    for k, stamp in enumerate(found):
        at = (k / rate) if rate else k / source
        assert abs((stamp - offset) * base - at) <= 1 / source / 2 + base
    if rate:
        more = FramePlan(0, available + 2, rate)
        assert len(targets(pts, more, time_base=base, slack=1 / source / 2)) <= available + 1


@given(RATES, RATES)
def test_a_slower_source_keeps_its_own_frames(source, wanted):
    rate = effective_rate(source, wanted)
    assert (rate is None) == (source <= wanted * Fraction(101, 100))
    assert frames_at(video(40, source), rate) <= 40


def test_a_held_frame_of_a_variable_rate_file_is_taken_as_often_as_it_is_shown():
    base = Fraction(1, 1000)
    pts = [0, 100, 200, 900, 1000]
    found = targets(pts, FramePlan(0, 6, Fraction(5)), time_base=base, slack=Fraction(1, 20))
    assert found == [0, 200, 200, 900, 900, 1000]


def test_positions():
    def draw(number: int, options: int) -> int:
        return (number * 7 + 3) % options

    assert starts(50, 17, selection="head", uses=3, draw=draw) == [(0, 3)]
    assert starts(50, 17, selection="chunk", uses=2, draw=draw) == [(0, 2), (17, 2)]
    assert starts(50, 17, selection="uniform", uses=1, draw=draw) == [(16, 1)]
    assert starts(50, 17, selection="uniform", uses=2, draw=draw) == [(8, 1), (24, 1)]
    assert starts(50, 17, selection="random", uses=2, draw=draw) == [(3, 1), (10, 1)]
    assert starts(17, 17, selection="random", uses=2, draw=draw) == [(0, 2)]
