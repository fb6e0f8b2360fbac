from __future__ import annotations

import pytest
import torch

from trainer_core.data import Loader, fill_cache
from trainer_core.errors import DataError, PluginError
from trainer_core.testing.clips import write_clips


@pytest.fixture
def filled(world):
    write_clips(world.folder(), n=6, sizes=[(64, 64)], frames=20, fps=16)
    world.add(video={"num_frames": 17})
    return world


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_a_second_fill_reuses_everything_and_loads_nothing(filled):
    data = filled.fill()
    assert data.encoded == {"toy.vae": 6, "toy.text": 8}
    filled.hooks.calls.clear()
    data = filled.fill()
    assert data.encoded == {"toy.vae": 0, "toy.text": 0}
    assert data.reused == {"toy.vae": 6, "toy.text": 8}
    assert filled.hooks.calls == []


def test_entries_hold_what_the_encoder_made_of_the_pixels(filled):
    from trainer_core.media import read_frames

    data = filled.fill()
    for sample in data.plan.samples:
        pixels = read_frames(data.plan.path_of(data.plan.files[sample.file]))[:17]
        blocks = torch.from_numpy(pixels).float().reshape(17, 4, 16, 4, 16, 3).mean((2, 4)) / 255
        wanted = blocks.permute(3, 0, 1, 2)
        assert torch.allclose(data.read_clip(sample)["latents"], wanted, atol=1e-6)
    assert data.read_caption("a prompt")["text"].shape == (8, 2)
    assert data.read_caption("")["text"].shape == (0, 2)


def test_other_weights_frames_or_bytes_are_other_entries(filled):
    filled.fill()
    assert filled.fill(version="2").encoded == {"toy.vae": 6, "toy.text": 8}
    filled.entries[0]["video"]["num_frames"] = 13
    assert filled.fill().encoded == {"toy.vae": 6, "toy.text": 0}
    write_clips(filled.folder(), n=1, seed=5, sizes=[(64, 64)], frames=20, fps=16)
    assert filled.fill().encoded["toy.vae"] == 1


def test_a_moved_dataset_reuses_its_entries(filled):
    filled.entries[0]["cache_dir_vae"] = str(filled.root / "vae")
    filled.fill()
    filled.folder().rename(filled.root / "moved")
    filled.entries[0]["instance_data_dir"] = str(filled.root / "moved")
    assert filled.fill().encoded == {"toy.vae": 0, "toy.text": 0}


def test_a_truncated_file_is_planned_again_or_skipped(filled):
    for n in range(2):
        cut(filled.folder() / f"clip_00{n}.mp4", 0.55 + 0.35 * n)
    filled.entries[0]["video"] = {"bucket_strategy": "resolution_frames", "max_frames": 20}
    filled.keys["disable_bucket_pruning"] = True
    before = filled.plan()
    assert {s.frames.count for s in before.samples} == {17}
    digest = before.digest
    data = filled.fill(plan=before)
    noted = [f for f in data.plan.files if f.note or f.skipped]
    assert noted
    assert data.plan.digest != digest
    assert any("can be decoded" in line or "decoded" in line for line in filled.said)
    for sample in data.plan.samples:
        assert data.read_clip(sample)["latents"].shape[1] == sample.frames.count
    # the correction is remembered: the next plan is the final one at once
    again = filled.fill()
    assert again.plan.digest == data.plan.digest
    assert again.encoded == {"toy.vae": 0, "toy.text": 0}


def test_a_fixed_length_that_a_truncated_file_lacks_skips_it(filled):
    cut(filled.folder() / "clip_003.mp4")
    data = filled.fill()
    assert "clip_003.mp4" in {f.name for f in data.plan.files if f.skipped}
    assert len(data.plan.samples) == 5


def test_an_interrupted_fill_goes_on_with_the_same_groups(filled):
    class Stop(Exception):
        pass

    made = []

    def stop_at_three(tensors):
        made.append(1)
        if len(made) == 3:
            raise Stop
        return tensors

    filled.hooks.spoil = stop_at_three
    with pytest.raises(Stop):
        filled.fill(batch_size=2)
    filled.hooks.spoil = lambda tensors: tensors
    filled.hooks.calls.clear()
    data = filled.fill(batch_size=2)
    assert data.encoded["toy.vae"] == 4
    assert data.reused["toy.vae"] == 2
    assert filled.hooks.calls == [("toy.vae", 2), ("toy.vae", 2)]
    # a group of which one entry is gone is encoded whole, and only that entry is written
    cache = data.clip_cache(data.encoders[0], data.plan.samples[3])
    (entry,) = cache.folder.rglob(data.clip_key(data.encoders[0], data.plan.samples[3]) + ".*")
    entry.unlink()
    filled.hooks.calls.clear()
    assert filled.fill(batch_size=2).encoded["toy.vae"] == 1
    assert filled.hooks.calls == [("toy.vae", 2)]


def test_verify_cache_finds_what_is_damaged(filled):
    data = filled.fill()
    for path in list((filled.root / "cache" / "vae").rglob("*.zst"))[:2]:
        path.write_bytes(path.read_bytes()[:-7])
    assert filled.fill().encoded["toy.vae"] == 0
    filled.keys["verify_cache"] = True
    assert filled.fill().encoded["toy.vae"] == 2
    assert data.plan.digest == filled.fill().plan.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: {"latents": t["latents"] / 0}, "NaN or infinite"),
        (lambda t: {"latent": t["latents"]}, "declared \\['latents'\\]"),
        (lambda t: {"latents": t["latents"].to("meta")}, "lies on meta"),
    ],
)
def test_what_an_encoder_returns_is_checked_and_its_plugin_named(filled, spoil, message):
    filled.hooks.spoil = spoil
    with pytest.raises(PluginError, match=f"plugin toy: (.|\n)*{message}"):
        filled.fill()
    assert not list((filled.root / "cache").glob("vae/**/*.zst"))


def test_clashing_encoders_are_refused(filled):
    run, plan, made = filled.run(), filled.plan(), filled.encoders()
    for wrong, message in (
        ((made[0], made[0]), "two encoders are named"),
        ((made[1],), "no encoder writes"),
    ):
        with pytest.raises(PluginError, match=message):
            fill_cache(plan, run, wrong, filled.hooks)


def steps(loader, count):
    found = iter(loader)
    try:
        return [next(found) for _ in range(count)]
    finally:
        loader.close()


def same(a, b) -> bool:
    return (
        a.sample_ids == b.sample_ids
        and a.captions == b.captions
        and a.moment == b.moment
        and torch.equal(a.latents, b.latents)
        and torch.equal(a.conditioning["text"], b.conditioning["text"])
    )


@pytest.fixture
def varied(filled):
    """Alternatives, dropout, accumulation: all that is drawn."""
    for path in filled.folder().glob("*.txt"):
        path.write_text("one\ntwo\nthree\n")
    filled.keys |= {"caption_dropout_probability": 0.3, "gradient_accumulation_steps": 2}
    return filled


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_gets_the_same_batches(varied):
    data = varied.fill()
    whole = steps(Loader(data, varied.run(), start_step=0), 12)
    for start in (1, 4, 7):
        part = steps(Loader(varied.fill(), varied.run(), start_step=start, prefetch=1), 12 - start)
        for found, wanted in zip(part, whole[start:], strict=True):
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    assert [b.moment.step for group in whole for b in group][:4] == [1, 1, 2, 2]
    drawn = {caption for group in whole for batch in group for caption in batch.captions}
    assert drawn == {"one", "two", "three", ""}
    # a dropped caption is the embedding of the empty text
    for batch in (b for group in whole for b in group):
        for row, caption in zip(batch.conditioning["text"], batch.captions, strict=True):
            assert row.shape == (80, 2)
            assert int((row != 0).sum()) == 2 * len(caption)


def test_epochs_are_counted(varied):
    loader = Loader(varied.fill(), varied.run(), start_step=0)
    assert (loader.batches_per_epoch, loader.steps_per_epoch) == (3, 2)
    assert [loader.epoch_of(step) for step in (1, 2, 3, 4)] == [1, 1, 2, 3]


def test_a_damaged_entry_met_while_training_is_rebuilt(varied):
    data = varied.fill(batch_size=2)
    wanted = steps(Loader(data, varied.run(), start_step=0), 3)
    for path in (varied.root / "cache").rglob("*.zst"):
        path.write_bytes(b"damage" + path.read_bytes()[6:])
    found = steps(Loader(data, varied.run(), start_step=0), 3)
    assert all(
        same(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert any("was damaged and is rebuilt" in line for line in varied.said)


def test_a_source_that_changed_meanwhile_is_not_taken_for_the_old_one(varied):
    data = varied.fill()
    for path in (varied.root / "cache" / "vae").rglob("*.zst"):
        path.unlink()
    for path in varied.folder().glob("*.mp4"):
        path.write_bytes(b"other")
    with pytest.raises(DataError, match="has changed or is gone"):
        steps(Loader(data, varied.run(), start_step=0), 1)


def test_eval_batches_are_fixed_whatever_is_trained(varied):
    write_clips(varied.folder("held"), n=3, seed=9, sizes=[(64, 64), (96, 64)], frames=20, fps=16)
    varied.add("held", kind="eval", video={"num_frames": 17})
    found = Loader(varied.fill(), varied.run(), start_step=0).eval_batches(2)
    assert [b.sample_ids for b in found["held"]] == [("held/clip_000.mp4",), ("held/clip_001.mp4",)]
    assert all(len(b.captions) == 1 and b.captions[0] for b in found["held"])
    later = Loader(varied.fill(), varied.run(), start_step=9).eval_batches(2)
    assert all(same(a, b) for a, b in zip(found["held"], later["held"], strict=True))


def test_a_text_that_is_too_long_names_its_encoder(filled):
    with pytest.raises(PluginError, match=r"toy\.text.*declares pad_to 3"):
        steps(Loader(filled.fill(pad=3), filled.run(), start_step=0), 1)
