"""``trainer plan`` rehearses every member of the family, with what it is given beside the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_core.catalogue import Catalogue
from trainer_core.flow import Flow
from trainer_core.optim import Optimizers
from trainer_core.planner import rehearse
from trainer_core.plugins import build
from trainer_core.progress import Display
from trainer_core.session import prepare
from trainer_core.settings.load import resolve
from trainer_core.testing.harness import CORE, write_world
from trainer_wan import Wan

umt5 = pytest.importorskip("trainer_umt5")
lora = pytest.importorskip("trainer_lora")
clip = pytest.importorskip("trainer_clip")

PLUGINS = {"wan": Wan, "umt5": umt5.Umt5, "lora": lora.Lora, "clip": clip.Clip}
KINDS = ["i2v-14b-2.1", "flf2v-14b-2.1", "i2v-14b-2.2-low", "t2v-14b-2.2-both", "ti2v-5b-2.2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan-family")


def foretold(world: Path, name: str, **more: Any) -> rehearse.Forecast:
    keys = {
        **CORE, "model_type": "lora", "lora_rank": 4, "max_train_steps": 3, "model_flavour": name,
        "plugins": ["wan", "lora"], "data_backend_config": str(write_world(world)),
        "output_dir": str(world / "none"), "cache_dir": str(world / "none"), **more,
    }  # fmt: skip
    catalogue = Catalogue.of(dict(PLUGINS))
    resolved = resolve(keys, environ={}, catalogue=catalogue)
    host = build(resolved, catalogue=catalogue, builtins=(Flow(), Optimizers()))
    begun = prepare(resolved, host, display=Display.silent())
    return rehearse.forecast(begun.run, host)


@pytest.mark.parametrize("name", KINDS)
def test_a_member_is_rehearsed_whole(world: Path, checkpoints, name: str):
    keys: dict[str, Any] = {"pretrained_model_name_or_path": str(checkpoints(name))}
    if name.startswith("ti2v"):
        keys["wan_first_frame_probability"] = 0.5
    forecast = foretold(world, name, **keys)
    assert forecast.unknown == ()
    wanted = {"wan.vae", "umt5.text"}
    wanted |= set() if name.startswith("t2v") else {"wan.condition"}
    wanted |= {"clip.vision"} if name.endswith("2.1") else set()
    assert set(forecast.cache) == wanted
    assert all(forecast.cache.values())
    (training,) = (p for p in forecast.phases if p.name == "training")
    single = foretold(world, name.replace("-both", "-low"), **keys)
    (alone,) = (p for p in single.phases if p.name == "training")
    ratio = training.parts["frozen weights"] / alone.parts["frozen weights"]
    assert (1.9 < ratio < 2.1) == name.endswith("-both")
