"""The keys of the chunked feed-forward, down to what the blocks see."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from trainer_core.errors import ConfigError
from trainer_core.types import ForwardPlan
from trainer_wan import Wan, config
from trainer_wan.config import CHUNK_VARIABLE, DEFAULT_CHUNK, LEAST_CHUNK, WanSettings, chunk_of


def settings(size=None, on=True) -> WanSettings:
    return WanSettings(enable_chunked_feed_forward=on, feed_forward_chunk_size=size)


@pytest.mark.parametrize(
    ("keys", "environ", "chunk"),
    [
        ((None, False), {}, 0),
        ((None, True), {}, DEFAULT_CHUNK),
        ((1000, True), {}, 1000),
        ((2, True), {}, LEAST_CHUNK),
        ((1000, True), {CHUNK_VARIABLE: "3000"}, 3000),
        ((None, False), {CHUNK_VARIABLE: "3000"}, 3000),
        ((None, False), {CHUNK_VARIABLE: " "}, 0),
        ((None, False), {CHUNK_VARIABLE: "2"}, LEAST_CHUNK),
    ],
)
def test_what_keys_and_environment_ask_for(keys, environ, chunk):
    found, said = chunk_of(settings(*keys), environ)
    assert found == chunk
    assert (said is not None) == (chunk == LEAST_CHUNK)


@pytest.mark.parametrize("value", ["two", "0", "-3", "1.5"])
def test_a_variable_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=f"environment: {CHUNK_VARIABLE} = '{value}'"):
        chunk_of(settings(), {CHUNK_VARIABLE: value})


def test_a_size_without_the_switch_is_refused():
    with pytest.raises(ValidationError, match="enable_chunked_feed_forward only"):
        settings(500, on=False)


def test_blocks_get_the_chunks_that_the_keys_ask_for(make_run, make_inputs, monkeypatch):
    monkeypatch.setattr(config, "LEAST_CHUNK", 8)
    monkeypatch.delenv(CHUNK_VARIABLE, raising=False)
    outcomes = {}
    for size in (None, 10, 4):
        plugin, run = Wan(settings(size, on=size is not None)), make_run(model_type="full")
        plugin.check(run)
        run.spec = plugin.describe_model(run)
        run.model = plugin.load_model(run)
        seen = []
        for block in run.model.modules["transformer"].blocks:
            block.ffn.register_forward_hook(lambda _, args, out, s=seen: s.append(out.shape[1]))
        out, _ = run.model.predict(make_inputs(), ForwardPlan())
        out.square().mean().backward()
        grad = run.model.modules["transformer"].blocks[0].ffn.net[2].weight.grad
        outcomes[size] = (seen, out.detach(), grad, run.said)
    assert outcomes[None][0] == 3 * [36]
    assert sorted(outcomes[10][0]) == sorted(2 * 3 * [10, 10, 10, 6])  # forward and recompute
    assert sorted(outcomes[4][0]) == sorted(2 * 3 * [8, 8, 8, 8, 4])
    assert [len(outcomes[s][3]) for s in (None, 10, 4)] == [0, 0, 1]
    assert "counts tokens; chunks of 8" in outcomes[4][3][0]
    for size in (10, 4):
        for found, expected in zip(outcomes[size][1:3], outcomes[None][1:3], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max())


def test_chunks_of_compiled_blocks_are_refused(make_run):
    with pytest.raises(ConfigError, match=r"compile_blocks = True.*enable_chunked_feed_forward"):
        Wan(settings()).check(make_run(compile_blocks=True))
