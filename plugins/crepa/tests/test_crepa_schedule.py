"""The weight and the cutoff in closed form."""

from __future__ import annotations

import pytest
import torch

from trainer_crepa.config import CrepaSettings
from trainer_crepa.cutoff import Cutoff
from trainer_crepa.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (Schedule(1, warm_up=100), 50, 0.5),
        (Schedule(1, warm_up=100), 0, 0.0),
        (Schedule(1, warm_up=100), 100, 1.0),
        (Schedule(1, course="linear", decay_end=100), 50, 0.5),
        (Schedule(1, course="cosine", decay_end=100), 50, 0.5),
        (Schedule(1, course="polynomial", power=2, decay_end=100), 50, 0.25),
        (Schedule(1, course="linear", warm_up=100, decay_end=200), 150, 0.5),
        (Schedule(1, course="linear", warm_up=100, decay_end=200), 200, 0.0),
        (Schedule(1, course="cosine", warm_up=100, decay_end=5000), 5000, 0.0),
        (Schedule(1, course="cosine", warm_up=100, decay_end=5000), 5100, 0.0),
        (Schedule(2, end=0.5, course="linear", decay_end=10), 5, 1.25),
        (Schedule(2, end=0.5, course="linear", decay_end=10), 99, 0.5),
        (Schedule(1, cutoff=50), 49, 1.0),
        (Schedule(1, cutoff=50), 50, 0.0),
        (Schedule(0.5), 10**6, 0.5),
    ],
)
def test_the_weight(schedule, step, expected):
    """O-C9."""
    assert schedule.at(step) == pytest.approx(expected, abs=1e-12)


def test_a_cosine_is_steepest_in_the_middle():
    weights = [Schedule(1, course="cosine", decay_end=100).at(step) for step in (0, 25, 75, 100)]
    assert weights == pytest.approx([1, 0.853553, 0.146447, 0], abs=1e-6)


def cutoff(**keys) -> Cutoff:
    return Cutoff(**{"threshold": 0.6, "decay": 0.5, "recovers": False, **keys})


def feed(what: Cutoff, *values: float) -> list[float]:
    return [float(what.update(torch.tensor(value))) for value in values]


def test_the_average_begins_with_the_first_value():
    found = cutoff(threshold=None)
    assert feed(found, 0.5, 0.9) == [1, 1]
    assert float(found.average) == pytest.approx(0.7)
    assert not found.is_final()


def test_the_average_keeps_the_share_of_its_decay():
    found = Cutoff(threshold=None, decay=0.9, recovers=False)
    feed(found, 0.5, 1.0)
    assert float(found.average) == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


def test_a_permanent_cutoff_stays():
    found = cutoff()
    assert feed(found, 0.5, 0.9, 0.0, 0.0) == [1, 0, 0, 0]
    assert found.is_final()


def test_a_recoverable_one_comes_back():
    found = cutoff(recovers=True)
    assert feed(found, 0.5, 0.9, 0.0) == [1, 0, 1]
    assert not found.is_final()


@pytest.mark.parametrize("recovers", [True, False])
def test_it_goes_on_from_its_state(recovers):
    values = (0.5, 0.9, 0.0, 0.1, 0.95)
    whole = feed(cutoff(recovers=recovers), *values)
    first, second = cutoff(recovers=recovers), cutoff(recovers=recovers)
    begun = feed(first, *values[:2])
    second.load_state_dict(first.state_dict(), device=torch.device("cpu"))
    assert begun + feed(second, *values[2:]) == whole
    assert torch.equal(
        second.average, 0.5 * (0.5 * (0.5 * torch.tensor(0.7) + 0) + 0.5 * torch.tensor(0.1))
        + 0.5 * torch.tensor(0.95),
    )  # fmt: skip


def test_names_of_the_reference_are_taken():
    fields = CrepaSettings.model_fields
    aliases = {
        name: fields[name].json_schema_extra["aliases"] for name in
        ("crepa_weight", "crepa_temporal_decay", "crepa_encoder")
    }  # fmt: skip
    assert aliases == {
        "crepa_weight": ["crepa_lambda"],
        "crepa_temporal_decay": ["crepa_adjacent_tau"],
        "crepa_encoder": ["crepa_model"],
    }
    defaults = CrepaSettings()
    assert (defaults.crepa_block_index, defaults.crepa_weight) == (8, 0.5)
    assert (defaults.crepa_adjacent_distance, defaults.crepa_temporal_decay) == (1, 1.0)
    assert (defaults.crepa_encoder, defaults.crepa_encoder_image_size) == ("dinov2_vitg14", 518)


@pytest.mark.parametrize(
    "keys",
    [
        {"crepa_feature_source": "backbone"}, {"crepa_use_backbone_features": True},
        {"crepa_self_flow": True}, {"crepa_use_tae": True}, {"crepa_adjacent_distance": -1},
        {"crepa_temporal_decay": 0}, {"crepa_encoder_frames_batch_size": 0},
        {"crepa_encoder_image_size": 32}, {"crepa_similarity_threshold": 1.2},
        {"crepa_warmup_steps": 10, "crepa_decay_steps": 10},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(keys):
    with pytest.raises(ValueError, match=next(reversed(keys))):
        CrepaSettings(**keys)
