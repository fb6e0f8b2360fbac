"""Through the real loop on the tiny model: when routes act, what they leave alone, what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core import FORCE_KEEP, Moment, PluginInfo, hookimpl
from trainer_core.testing.harness import Finished, Interrupted, train
from trainer_core.types import BlockFlops
from trainer_tread import Tread
from trainer_tread.hooks import Forced, Kept, sentences

STEPS = 4


def config(*routes: tuple[float, int, int]) -> dict[str, Any]:
    names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    return {"routes": [dict(zip(names, values, strict=True)) for values in routes]}


class Watched(Tread):
    """TREAD that remembers what its routes drew: (first block, moment) → ids."""

    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.drawn: dict[tuple[int, Moment], torch.Tensor] = {}
        self.calls = 0

    @hookimpl
    def route_tokens(self, run):
        return [self._watched(route) for route in super().route_tokens(run)]

    def _watched(self, route):
        keep = route.keep

        def watch(num_samples, num_tokens, moment):
            self.calls += 1
            self.drawn[route.start, moment] = ids = keep(num_samples, num_tokens, moment)
            return ids

        object.__setattr__(route, "keep", watch)
        return route


class Asker:
    """Asks for the un-routed prediction in every micro-batch and adds no loss."""

    info = PluginInfo(summary="Asks")

    def __init__(self, settings) -> None:
        self.answers: list[torch.Tensor] = []

    @hookimpl
    def prepare_inputs(self, run, inputs):
        self.answers.append(run.predict(inputs))
        return inputs


class Forcer:
    """Keeps the first frame of every sample."""

    info = PluginInfo(summary="Forces")

    def __init__(self, settings) -> None:
        self.mask = torch.zeros(0)

    @hookimpl
    def prepare_inputs(self, run, inputs):
        frames, rows, columns = run.model.token_grid(tuple(inputs.x_t.shape))
        self.mask = torch.zeros(inputs.x_t.shape[0], frames * rows * columns, dtype=torch.bool)
        self.mask[:, : rows * columns] = True
        run.state[FORCE_KEEP] = self.mask
        return inputs


def run(
    folder: Path, output: str, *, plugins: dict[str, type], named=None, **keys: Any
) -> Finished:
    tread = keys.pop("routes", ((0.5, 0, 1), (0.25, 2, -1)))
    settings = {"tread_config": config(*tread), "max_train_steps": STEPS, **keys}
    return train(folder, plugins=plugins, named=named, settings=settings, output=output)


RENDERS = {
    "validation_prompt": "a red circle",
    "validation_step_interval": 2,
    "validation_num_inference_steps": 2,
    "validation_num_video_frames": 5,
    "validation_resolution": "32x32",
    "eval_steps_interval": 2,
    "num_eval_images": 2,
    "use_ema": True,
}


def test_routes_are_drawn_once_a_micro_step_and_never_elsewhere(tmp_path: Path):
    """O-T9: evaluation, validation and run.predict go without."""
    keys = {**RENDERS, "gradient_accumulation_steps": 2, "max_train_steps": STEPS}
    keys["tread_config"] = config((0.5, 0, 1), (0.25, 2, -1))
    plugins = {"tread": Watched, "asker": Asker}
    done = train(tmp_path, plugins=plugins, settings=keys, num_held_out=2)
    tread = done.plugin("tread")
    moments = [Moment(step, micro) for step in range(1, STEPS + 1) for micro in (0, 1)]
    assert set(tread.drawn) == {(start, moment) for start in (0, 2) for moment in moments}
    assert tread.calls == 2 * len(moments)
    plain = train(
        tmp_path, plugins=plugins, named=["asker"], settings=keys, num_held_out=2, output="plain"
    )
    assert torch.equal(done.plugin("asker").answers[0], plain.plugin("asker").answers[0])
    assert done.events[:1] == plain.events[:1]
    first = [next(e for e in each.events if e["kind"] == "eval") for each in (done, plain)]
    assert first[0] == first[1], "the held-out loss before training"
    assert done.draws == plain.draws
    assert [e["loss"] for e in done.steps] != [e["loss"] for e in plain.steps]


def test_ids_are_those_of_seed_moment_and_route_with_two_samples(tmp_path: Path, make_run):
    done = run(tmp_path, "output", plugins={"tread": Watched})
    same = make_run(seed=7)
    for (start, moment), ids in done.plugin("tread").drawn.items():
        index, drop = (0, 0.5) if start == 0 else (1, 0.25)
        assert torch.equal(ids, Kept(same, index, (0, 1), drop, Forced(same)).ids(2, 8, moment))
        assert ids.shape == (2, 4 if start == 0 else 6)


def test_the_order_of_the_list_is_of_no_consequence(tmp_path: Path):
    routes = ((0.5, 0, 1), (0.25, 2, -1))
    one = run(tmp_path, "one", plugins={"tread": Tread}, routes=routes)
    two = run(tmp_path, "two", plugins={"tread": Tread}, routes=routes[::-1])
    assert one.weights() == two.weights()


def test_a_resumed_run_draws_what_the_whole_run_drew(tmp_path: Path):
    keys = {"tread_config": config((0.5, 0, 1)), "max_train_steps": STEPS}
    plugins = {"tread": Watched}
    whole = train(tmp_path, plugins=plugins, settings=keys)
    with pytest.raises(Interrupted):
        train(tmp_path, plugins=plugins, settings=keys, output="resumed", crash_at=3)
    resumed = train(tmp_path, plugins=plugins, settings=keys, output="resumed")
    drawn, again = whole.plugin("tread").drawn, resumed.plugin("tread").drawn
    assert {moment.step for _, moment in again} == {3, 4}
    assert all(torch.equal(ids, drawn[at]) for at, ids in again.items())
    assert resumed.weights() == whole.weights()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropping_nothing_is_the_run_without_it_bit_for_bit(tmp_path: Path, checkpointing: bool):
    """O-T1 over a whole run."""
    keys = {"gradient_checkpointing": checkpointing, "routes": ((0.0, 0, -1),)}
    done = run(tmp_path, "with", plugins={"tread": Tread}, **keys)
    plain = run(tmp_path, "without", plugins={"tread": Tread}, named=[], **keys)
    assert done.steps == plain.steps
    assert done.weights() == plain.weights()


def test_checkpointing_changes_no_bit_of_a_routed_run(tmp_path: Path):
    runs = [
        run(tmp_path, f"c-{on}", plugins={"tread": Tread}, gradient_checkpointing=on)
        for on in (False, True)
    ]
    assert runs[0].steps == runs[1].steps
    assert runs[0].weights() == runs[1].weights()


def test_another_plugin_may_force_tokens_to_stay(tmp_path: Path):
    plugins = {"tread": Watched, "forcer": Forcer}
    done = run(tmp_path, "output", plugins=plugins, routes=((0.75, 0, 1), (0.25, 2, -1)))
    for (start, _), ids in done.plugin("tread").drawn.items():
        assert ids.shape == (2, 4 if start == 0 else 6)
        assert torch.equal(ids[:, :4], torch.arange(4).expand(2, -1))


def test_a_run_says_what_its_routes_do(tmp_path: Path):
    done = run(tmp_path, "output", plugins={"tread": Tread}, routes=((0.25, 2, -2), (0.5, 1, 1)))
    lines = [line for line in done.said if line.startswith("tread ")]
    assert lines == ["tread keeps 50 % of the tokens in block 1, 75 % in block 2 of 4"]
    outer = run(tmp_path, "outer", plugins={"tread": Tread}, routes=((0.5, 0, -1),))
    lines = [line for line in outer.said if line.startswith("tread ")]
    assert lines[0] == "tread keeps 50 % of the tokens in blocks 0 to 3 of 4"
    assert lines[1].startswith("tread routes the first and the last block;")


class Counted:
    """A model that knows its costs, those of Wan 2.1 1.3B."""

    def block_flops(self, num_tokens: int) -> BlockFlops:
        return BlockFlops(
            weights=(12 * 1536**2 + 4 * 1536 * 8960) * num_tokens,
            attention=4 * 1536 * num_tokens * (num_tokens + 512),
            text=4 * 512 * 1536**2,
        )


@pytest.mark.parametrize(("model_type", "factor"), [("lora", "1.18"), ("full", "1.17")])
def test_the_line_tells_the_modelled_factor_at_the_largest_clip(make_run, model_type, factor):
    current = make_run(model_type=model_type, gradient_checkpointing=True)
    current.model = Counted()
    current.most_tokens = 29640
    assert sentences(current, [((2, 28), 0.1)], 30) == [
        "tread keeps 90 % of the tokens in blocks 2 to 28 of 30; "
        f"{factor}x by the FLOP model at 29640 tokens (the largest clip)"
    ]
