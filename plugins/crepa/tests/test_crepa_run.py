"""Through the real loop on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import ConfigError, PluginInfo, hookimpl
from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_crepa import Crepa, alignment
from trainer_crepa import teacher as teachers
from trainer_crepa.testing import write_teacher

STEPS = 4
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}


class Watched(Crepa):
    """Remembers what it computed, and how often the teacher looked."""

    loaded = 0

    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.seen: list[tuple[Any, Any]] = []
        self.gradients: list[dict[str, bool]] = []

    def _load(self, run):
        type(self).loaded += 1
        return super()._load(run)

    @hookimpl
    def compute_loss(self, run, batch, output):
        term = super().compute_loss(run, batch, output)
        self.seen.append((term, output, self._again(run, batch, output)))
        if term is not None and not self.gradients:
            named = dict(run.model.modules["transformer"].named_parameters())
            found = torch.autograd.grad(
                term.value.sum(), list(named.values()), retain_graph=True, allow_unused=True
            )
            self.gradients.append(
                {n: g is not None and bool(g.any()) for n, g in zip(named, found, strict=True)}
            )
        return term

    def _again(self, run, batch, output):
        """Return the term from what this micro-batch's own tokens are compared with."""
        if self._tap is None:
            return None
        tap, features = output.taps[self._tap], batch.conditioning["crepa_features"]
        grid = run.model.token_grid(tuple(output.inputs.x_t.shape))[1:]
        with torch.no_grad():
            projected = self._projector(tap.tokens)
        weights = alignment.neighbours(1, self.settings.crepa_temporal_decay, cumulative=False)
        found = alignment.score(projected, alignment.on_grid(features, *grid), weights, ids=tap.ids)
        return -self.settings.crepa_weight * found.value


class Looker:
    """Notes the taps and conditioning of each micro-batch."""

    info = PluginInfo(summary="Looks")

    def __init__(self, settings) -> None:
        self.seen: list[tuple[bool, bool]] = []

    @hookimpl
    def compute_loss(self, run, batch, output):
        self.seen.append((bool(output.taps), "crepa_features" in batch.conditioning))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crepa")
    write_teacher(folder / "teacher")
    return folder


def keys(world: Path, **more: Any) -> dict[str, Any]:
    return {
        "max_train_steps": STEPS, "crepa_enabled": True, "crepa_block_index": 1,
        "crepa_encoder": str(world / "teacher"), "crepa_encoder_image_size": 64, **more,
    }  # fmt: skip


def run(world: Path, *, output: str, plugins=None, settings=None, **more: Any) -> Finished:
    found = {"crepa": Watched} if plugins is None else plugins
    chosen = keys(world) if settings is None else settings
    return train(world, plugins=found, settings=chosen, output=output, **more)


@pytest.fixture(scope="module")
def without(world: Path) -> Finished:
    return run(world, output="without", plugins={}, settings={"max_train_steps": STEPS})


@pytest.fixture(scope="module")
def on(world: Path, without: Finished) -> Finished:
    return run(world, output="on")


def test_it_changes_the_loss_and_no_draw(on: Finished, without: Finished):
    assert on.draws == without.draws
    for step, plain in zip(on.steps, without.steps, strict=True):
        assert step["crepa/weight"] == 0.5
        assert -1 <= step["crepa/similarity"] <= 1
        assert -1 <= step["crepa/score"] <= 1
        assert step["loss"] == pytest.approx(step["flow"] + step["crepa"], abs=1e-6)
        assert "crepa" not in plain
    assert on.steps[0]["flow"] == without.steps[0]["flow"], "the first forward is the same"


def test_the_term_is_minus_the_weighted_score(world: Path):
    settings = keys(world, crepa_normalize_neighbour_sum=True, crepa_warmup_steps=2)
    done = run(world, output="signed", settings=settings)
    for step, weight in zip(done.steps, (0.0, 0.25, 0.5, 0.5), strict=True):
        assert step["crepa/weight"] == weight
        assert step["crepa"] == pytest.approx(-weight * step["crepa/score"], abs=1e-6)
    assert done.steps[-1]["crepa"] != 0


def test_the_projector_learns_with_its_own_rate_and_is_saved(world: Path, on: Finished):
    from trainer_core.files import read_tensors

    first, last = (
        read_tensors(on.folder / f"checkpoint-{n}" / "plugin_parameters.safetensors")
        for n in (2, 4)
    )
    names = {f"crepa/{n}" for n in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")}
    assert set(first) == names
    assert not torch.equal(first["crepa/linear.weight"], last["crepa/linear.weight"])
    assert not any("projector" in name for name in on.weights())
    other = run(world, output="own rate", settings=keys(world, crepa_learning_rate=1e-6))
    moved = read_tensors(other.folder / "checkpoint-4" / "plugin_parameters.safetensors")
    change = {
        n: (a["crepa/linear.weight"] - b["crepa/linear.weight"]).abs().max()
        for n, a, b in (("own", moved, read_tensors(
            other.folder / "checkpoint-2" / "plugin_parameters.safetensors")), ("run", last, first))
    }  # fmt: skip
    assert change["own"] < 1e-5 < 1e-4 < change["run"]


def test_only_the_blocks_up_to_the_tap_get_a_gradient(on: Finished):
    """O-C5."""
    (found,) = on.plugin("crepa").gradients
    blocks = {int(name.split(".")[1]) for name, is_there in found.items()
              if is_there and name.startswith("blocks.")}  # fmt: skip
    assert blocks == {0, 1}


def test_weight_zero_is_the_run_without_it_and_calls_no_teacher(world: Path, without: Finished):
    """O-C5."""
    before = Watched.loaded
    done = run(
        world, output="zero", settings=keys(world, crepa_weight=0, crepa_encoder="facebook/nothing")
    )
    assert done.weights() == without.weights()
    assert done.steps == without.steps
    assert Watched.loaded == before
    assert "crepa aligns nothing: crepa_weight is 0" in done.said


def test_features_are_cached_and_the_teacher_is_not_loaded_again(world: Path, on: Finished):
    """O-C10."""
    before = Watched.loaded
    again = run(world, output="again")
    assert Watched.loaded == before
    assert again.weights() == on.weights()
    assert "cache of crepa.teacher: 4 reused, 0 encoded" in again.said
    other = run(world, output="other size", settings=keys(world, crepa_encoder_image_size=70))
    assert "cache of crepa.teacher: 0 reused, 4 encoded" in other.said
    write_teacher(world / "second", seed=1)
    second = keys(world, crepa_encoder=str(world / "second"))
    assert (
        "cache of crepa.teacher: 0 reused, 4 encoded"
        in run(world, output="second", settings=second).said
    )


def test_cached_features_are_what_the_teacher_sees(world: Path, monkeypatch: pytest.MonkeyPatch):
    """O-C10: bit for bit, and a damaged entry is made anew."""
    made: list[torch.Tensor] = []
    real = teachers.features

    def watch(*arguments, **named):
        made.append(real(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(teachers, "features", watch)

    class Keeper(Watched):
        @hookimpl
        def compute_loss(self, run, batch, output):
            kept.extend(batch.conditioning["crepa_features"])

    kept: list[torch.Tensor] = []
    settings = keys(world, crepa_encoder_image_size=84, max_train_steps=2)
    run(world, output="kept", plugins={"crepa": Keeper}, settings=settings)
    assert len(made) == 4
    assert kept
    assert all(any(torch.equal(a, b) for b in made) for a in kept)


def test_what_the_features_take_is_told_before_they_are_written(on: Finished):
    # 4 clips, 2 latent frames, 2 x 2 tokens, 24 numbers of 2 bytes
    line = "crepa keeps features of 4 clips in the cache, 1.54 kB in all"
    place = next(k for k, said in enumerate(on.said) if said.startswith(line))
    encoded = next(k for k, said in enumerate(on.said) if said.startswith("encode crepa.teacher"))
    assert place < encoded


def test_inside_a_route_it_compares_the_kept_tokens(world: Path):
    tread = pytest.importorskip("trainer_tread").Tread
    settings = keys(world, tread_config={"routes": [ROUTE]})
    done = run(world, output="tread", plugins={"crepa": Watched, "tread": tread}, settings=settings)
    for term, output, again in done.plugin("crepa").seen:
        tap = output.taps[1]
        assert tap.ids.shape == (2, 4)
        assert tap.tokens.shape[:2] == (2, 4)
        assert term.value.shape == (2,)
        assert torch.equal(term.value.detach(), again), "each kept token with its own place"


@pytest.mark.parametrize("ratio", [0.0])
def test_a_route_that_drops_nothing_changes_no_bit(world: Path, on: Finished, ratio):
    tread = pytest.importorskip("trainer_tread").Tread
    settings = keys(world, tread_config={"routes": [{**ROUTE, "selection_ratio": ratio}]})
    done = run(world, output="all", plugins={"crepa": Watched, "tread": tread}, settings=settings)
    assert done.steps == on.steps


def test_after_the_cutoff_nothing_is_tapped_or_read(world: Path):
    settings = keys(world, crepa_cutoff_step=2, max_train_steps=12)
    done = run(
        world, output="cutoff", plugins={"crepa": Crepa, "looker": Looker}, settings=settings
    )
    seen = done.plugin("looker").seen
    assert [taps for taps, _ in seen] == [True] * 2 + [False] * 10
    assert seen[-1] == (False, False), "features are not read any more"
    assert ["crepa" in step for step in done.steps] == [True] * 2 + [False] * 10
    assert "crepa is over after 2 steps" in done.said


def test_the_similarity_ends_it_for_good(world: Path):
    settings = keys(world, crepa_similarity_threshold=-1.0, max_train_steps=3)
    done = run(world, output="threshold", settings=settings)
    assert [step.get("crepa/weight") for step in done.steps] == [0.0, None, None]
    settings["crepa_threshold_mode"] = "recoverable"
    done = run(world, output="recoverable", settings=settings)
    assert [step["crepa/weight"] for step in done.steps] == [0.0] * 3
    assert [step["crepa"] for step in done.steps] == [0.0] * 3


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"crepa_cutoff_step": 2},
        {"crepa_scheduler": "cosine", "crepa_warmup_steps": 1},
        {"crepa_similarity_threshold": 0.0, "crepa_similarity_ema_decay": 0.5},
    ],
    ids=["plain", "cutoff", "schedule", "threshold"],
)
def test_a_resumed_run_ends_with_the_same_bits(world: Path, more, request):
    name = request.node.callspec.id
    whole = run(world, output=f"whole {name}", settings=keys(world, **more))
    with pytest.raises(Interrupted):
        run(world, output=f"cut {name}", settings=keys(world, **more), crash_at=4)
    done = run(world, output=f"cut {name}", settings=keys(world, **more))
    assert done.weights() == whole.weights()
    assert done.steps == whole.steps
    file = Path("checkpoint-4") / "plugin_parameters.safetensors"
    assert (done.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_the_model_s_number_of_blocks_is_told(world: Path):
    for index in (4, 8, -5):
        refused = attempt(
            world, plugins={"crepa": Crepa}, settings=keys(world, crepa_block_index=index),
            output="refused",
        )  # fmt: skip
        assert isinstance(refused.error, ConfigError)
        assert f"crepa_block_index = {index}: is not in the model, which has 4 blocks" in str(
            refused.error
        )
        assert "probe" not in " ".join(refused.said), "before any data was looked at"
    last = run(world, output="last", settings=keys(world, crepa_block_index=-1))
    assert "crepa aligns block 3 of 4" in " ".join(last.said)


def test_naming_it_switches_it_on_and_false_beside_it_is_refused(world: Path):
    settings = keys(world)
    del settings["crepa_enabled"]
    done = run(world, output="named", settings=settings)
    assert "crepa" in done.steps[0]
    refused = attempt(
        world, plugins={"crepa": Crepa}, settings=keys(world, crepa_enabled=False), output="refused"
    )
    assert "crepa_enabled" in str(refused.error)


def test_the_vae_encoder_is_left_out_when_asked(world: Path):
    from trainer_core import DROP_VAE_ENCODER

    class Asker(Looker):
        @hookimpl
        def compute_loss(self, run, batch, output):
            self.seen.append(run.state.get(DROP_VAE_ENCODER, False))

    for asked in (True, False):
        done = run(
            world, output=f"drop {asked}", plugins={"crepa": Crepa, "asker": Asker},
            settings=keys(world, crepa_drop_vae_encoder=asked, max_train_steps=1),
        )  # fmt: skip
        assert done.plugin("asker").seen == [asked]


def test_events_can_be_read_as_json(on: Finished):
    lines = (on.folder / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line)["kind"] for line in lines)
