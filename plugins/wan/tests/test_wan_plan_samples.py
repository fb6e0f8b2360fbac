"""What ``trainer plan`` foretells of rendering samples is what rendering them takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from trainer_core import PluginInfo, hookimpl
from trainer_core.catalogue import Catalogue
from trainer_core.flow import Flow
from trainer_core.optim import Optimizers
from trainer_core.planner import auto, rehearse
from trainer_core.planner.fit import Remedy, ladder, needed
from trainer_core.planner.live import LiveBytes, num_bytes, weights_of
from trainer_core.plugins import build
from trainer_core.progress import Display
from trainer_core.session import prepare
from trainer_core.settings.load import resolve
from trainer_core.testing.harness import CORE, train, write_world
from trainer_wan import Wan, sampling, vae
from trainer_wan.testing import write_checkpoint

lora = pytest.importorskip("trainer_lora")
umt5 = pytest.importorskip("trainer_umt5")
clip = pytest.importorskip("trainer_clip")

PLUGINS = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "clip": clip.Clip}
DENOISING, DECODING = "samples, denoising", "samples, decoding"
BESIDE = "averages and optimiser"
EXACT = 0.005


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan-samples")
    write_checkpoint(folder / "model", layers=3)
    return folder


def keys(world: Path, **more: Any) -> dict[str, Any]:
    return {
        **CORE, "model_type": "lora", "lora_rank": 4, "max_train_steps": 2, "validation_guidance": 1,
        "pretrained_model_name_or_path": str(world / "model"), "plugins": ["wan", "lora"],
        "data_backend_config": str(write_world(world)), "output_dir": str(world / "none"),
        "cache_dir": str(world / "none"), "validation_prompt": "a red square",
        "validation_step_interval": 1, "validation_resolution": "64x48",
        "validation_num_video_frames": 9, "validation_num_inference_steps": 2, **more,
    }  # fmt: skip


def prepared(world: Path, **more: Any) -> tuple[Any, Any]:
    catalogue = Catalogue.of(dict(PLUGINS))
    resolved = resolve(keys(world, **more), environ={}, catalogue=catalogue)
    return resolved, build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))


def foretold(world: Path, **more: Any) -> dict[str, rehearse.Phase]:
    resolved, host = prepared(world, **more)
    begun = prepare(resolved, host, display=Display.silent())
    return {phase.name: phase for phase in rehearse.forecast(begun.run, host).phases}


class Watcher:
    """Weighs the first pass of the denoiser and the first decoding of a real run."""

    info = PluginInfo(summary="Weighs samples")
    seen: ClassVar[dict[str, int]] = {}

    def __init__(self, settings: Any) -> None:
        Watcher.seen = {}

    @hookimpl(wrapper=True)
    def validate(self, run):
        real = sampling.denoised, vae.decode

        def denoised(network, *tensors):
            weights = weights_of(run.model.modules.values())
            *given, begin = tensors
            parts = (begin.condition, begin.image_embeds, begin.first_frame)
            known = [*weights, *given, *(part for part in parts if part is not None)]
            return self.weighed(DENOISING, known, lambda: real[0](network, *tensors))

        def decode(decoder, latents):
            known = [*weights_of([decoder, *run.model.modules.values()])]
            return self.weighed(DECODING, known, lambda: real[1](decoder, latents))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "denoised", denoised)
            patch.setattr(vae, "decode", decode)
            return (yield)

    def weighed(self, name, known, act):
        if name in self.seen:
            return act()
        with LiveBytes() as live:
            live.know(known)
            live.restart()
            made = act()
        self.seen[name] = live.peak
        return made


@pytest.mark.parametrize(
    "more",
    [{}, {"vae_enable_tiling": True, "validation_resolution": "320x272"}, {"use_ema": True}],
    ids=["plain", "tiling", "ema"],
)
def test_the_bytes_of_samples_are_those_of_real_ones(world: Path, tmp_path: Path, more):
    phases = foretold(world, **more)
    chosen = keys(world, **more)
    names = chosen.pop("plugins")
    del chosen["output_dir"]
    train(
        world, plugins={**PLUGINS, "watcher": Watcher}, named=[*names, "umt5", "watcher"],
        settings=chosen, output=f"real-{tmp_path.name}",
    )  # fmt: skip
    assert set(Watcher.seen) == {DENOISING, DECODING}
    for name, real in Watcher.seen.items():
        phase = phases[name]
        own = phase.num_bytes - phase.parts[BESIDE]
        assert own == pytest.approx(real, rel=EXACT), name
    trained = sum(p.num_bytes for p in phases.values() if p.name == "training")
    assert trained


@pytest.mark.parametrize("more", [{"validation_step_interval": 0}, {"validation_prompt": ""}])
def test_without_samples_there_is_nothing_of_them(world: Path, more):
    chosen = {key: value for key, value in keys(world, **more).items() if value != ""}
    catalogue = Catalogue.of(dict(PLUGINS))
    resolved = resolve(chosen, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    begun = prepare(resolved, host, display=Display.silent())
    assert not [
        p for p in rehearse.forecast(begun.run, host).phases if p.name.startswith("samples")
    ]


@pytest.mark.parametrize(
    "name", ["i2v-14b-2.1", "flf2v-14b-2.1", "t2v-14b-2.2-both", "ti2v-5b-2.2"]
)
def test_members_that_are_given_frames_are_rehearsed_with_them(world: Path, checkpoints, name: str):
    more: dict[str, Any] = {"pretrained_model_name_or_path": str(checkpoints(name))}
    more |= {"model_flavour": name, "validation_resolution": "64x64"}
    if name.startswith("ti2v"):
        more["wan_first_frame_probability"] = 0.5
    phases = foretold(world, **more)
    assert phases[DENOISING].parts["at work"]
    assert phases[DECODING].parts["weights"] > phases[DENOISING].parts["weights"]


def test_an_expert_that_rests_is_not_counted(world: Path, checkpoints):
    name = "t2v-14b-2.2-both"
    more = {"pretrained_model_name_or_path": str(checkpoints(name)), "model_flavour": name}
    awake = foretold(world, **more)
    resolved, host = prepared(world, **more, wan_one_expert_resident=True)
    begun = prepare(resolved, host, display=Display.silent())
    found = rehearse.forecast(begun.run, host)
    rests = {phase.name: phase for phase in found.phases}
    transformer = begun.run.model.modules["transformer"]
    expert = num_bytes(p for p in transformer.parameters() if not p.requires_grad)
    assert found.host == expert
    for phase, part in (
        ("training", "frozen weights"),
        (DENOISING, "weights"),
        (DECODING, "weights"),
    ):
        assert awake[phase].parts[part] - rests[phase].parts[part] == expert
        assert awake[phase].num_bytes - rests[phase].num_bytes == expert


def test_the_other_stage_counts_where_it_is_loaded_for_samples(world: Path, checkpoints):
    both = {"pretrained_model_name_or_path": str(checkpoints("t2v-14b-2.2-both"))}
    more = {**both, "model_flavour": "t2v-14b-2.2-high"}
    alone = foretold(world, **more)
    with_other = foretold(world, **more, wan_validation_load_other_stage=True)
    in_turns = foretold(  # the second comes when the first has gone
        world, **more, wan_validation_load_other_stage=True, wan_one_expert_resident=True
    )
    frozen = alone["training"].parts["frozen weights"]
    gained = with_other[DENOISING].parts["weights"] - alone[DENOISING].parts["weights"]
    assert gained == pytest.approx(frozen, rel=0.01)
    assert with_other[DECODING].num_bytes == alone[DECODING].num_bytes
    assert in_turns[DENOISING].num_bytes == alone[DENOISING].num_bytes


def test_blocks_that_come_one_by_one_are_not_taken_off_twice(world: Path, checkpoints):
    offload = pytest.importorskip("trainer_group_offload")
    name = "t2v-14b-2.2-both"
    more = {"pretrained_model_name_or_path": str(checkpoints(name)), "model_flavour": name}
    both = {"enable_group_offload": True, "wan_one_expert_resident": True}
    catalogue = Catalogue.of({**PLUGINS, "group_offload": offload.GroupOffload})
    chosen = keys(world, **more, **both) | {"plugins": ["wan", "lora", "group_offload"]}
    resolved = resolve(chosen, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    begun = prepare(resolved, host, display=Display.silent())
    found = rehearse.forecast(begun.run, host)
    assert min(size for phase in found.phases for size in phase.parts.values()) >= 0
    blocks = [m for s in begun.run.model.stacks().values() for m in s.blocks]
    frozen = num_bytes(p for b in blocks for p in b.parameters() if not p.requires_grad)
    assert 0 < found.host < frozen


def test_averages_that_samples_come_from_let_the_weights_wait_beside_them(world: Path):
    plain = foretold(world, use_ema=True, ema_validation="none")
    swapped = foretold(world, use_ema=True)
    trained = plain["training"].parts["trained weights"]
    for phase in (DENOISING, DECODING):
        assert swapped[phase].parts[BESIDE] - plain[phase].parts[BESIDE] == trained


def test_decoding_that_does_not_fit_has_remedies(world: Path):
    large = {"validation_resolution": "512x512", "validation_num_video_frames": 17}
    resolved, host = prepared(world, **large)
    begun = prepare(resolved, host, display=Display.silent())
    found = rehearse.forecast(begun.run, host)
    assert found.peak.name == DECODING

    def other(changed: Any, encoders: bool) -> rehearse.Forecast:
        other_resolved, other_host = prepared(world, **large, **changed)
        again = prepare(other_resolved, other_host, display=Display.silent())
        return rehearse.forecast(again.run, other_host, known=None if encoders else found)

    tiling = Remedy({"vae_enable_tiling": True}, "tiles", (rehearse.SAMPLES,))
    (rung,) = ladder(
        found, capacity=needed(found) - 1, current=resolved.core.model_dump().get, forecast=other,
        remedies=[tiling],
    )  # fmt: skip
    assert needed(rung.forecast) < needed(found)


def test_auto_tells_when_samples_do_not_fit(world: Path):
    large = {"validation_resolution": "512x512", "validation_num_video_frames": 17}
    with torch.random.fork_rng(devices=[]):
        capacity = 1.02 * 2**30
        _, sentence = auto.settle(lambda more: prepared(world, **large, **more), capacity=capacity)
    assert "samples, decoding needs" in sentence
    assert "trainer plan --vram tells what does" in sentence
    _, sentence = auto.settle(lambda more: prepared(world, **large, **more), capacity=64 * 2**30)
    assert "samples" not in sentence
