"""What every plugin must keep to, as a test class. Subclass it in your plugin's tests.

    class TestMine(PluginContract):
        name = "my_loss"
        plugin = MyLoss
        settings = {"my_loss_weight": 0.5}

It runs the plugin through the real loop on a tiny model, on the CPU and without a network. A test
that does not apply to a plugin says so and is skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trainer_core.catalogue import read_entry
from trainer_core.errors import ConfigError, PluginError
from trainer_core.settings.keys import PluginSettings
from trainer_core.testing.harness import Finished, Interrupted, attempt, train
from trainer_core.testing.recorder import HookRecorder
from trainer_core.types import API_VERSION, PluginInfo

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "av", "tensorboard", "wandb")
STEPS, MIDDLE = 4, 2


class PluginContract:
    """Subclass it and set the attributes.

    name: what runs call the plugin. plugin: its class. settings: its keys that make it act. core: other
    keys of the run. others: name → class of plugins that it needs. core_without: keys on top of
    ``core`` for the run without the plugin, such as ``{"model_type": "full"}`` for an adapter;
    None where no run can do without it. A model's plugin runs instead of the tiny model.
    """

    name: ClassVar[str]
    plugin: ClassVar[type]
    settings: ClassVar[Mapping[str, Any]] = {}
    core: ClassVar[Mapping[str, Any]] = {}
    others: ClassVar[Mapping[str, type]] = {}
    core_without: ClassVar[Mapping[str, Any] | None] = {}

    @classmethod
    def world(cls, folder: Path) -> Mapping[str, Any]:
        """Write what the plugin's runs need below ``folder``; return more keys, such as paths."""
        return {}

    # --- what it declares ---------------------------------------------------------------------

    @property
    def info(self) -> PluginInfo:
        """What the plugin declares."""
        info = self.plugin.info  # type: ignore[attr-defined]  # the first test checks it
        assert isinstance(info, PluginInfo)
        return info

    def test_it_is_a_plugin_that_the_host_accepts(self) -> None:
        entry = read_entry(self.name, self.plugin)
        assert not entry.error, entry.error
        assert self.info.api == API_VERSION
        assert self.info.summary.strip(), "summary is the line of `trainer plugins list`"
        assert "\n" not in self.info.summary

    def test_its_keys_are_described_frozen_and_strict(self) -> None:
        model = self.info.settings
        if model is None:
            pytest.skip("it has no keys")
        assert issubclass(model, PluginSettings)
        assert model.model_config.get("frozen") is True
        assert model.model_config.get("extra") == "forbid"
        for name, field in model.model_fields.items():
            assert (field.description or "").strip(), f"{name} has no description"
        with pytest.raises(ValueError, match="no_such_key"):
            model(**{**self.settings, "no_such_key": 1})

    def test_settings_of_the_contract_are_its_own(self) -> None:
        fields = self.info.settings.model_fields if self.info.settings else {}
        assert set(self.settings) <= set(fields), "other keys belong into `core`"

    def test_a_misspelt_key_is_refused_before_anything_loads(self, tmp_path: Path) -> None:
        keys = {**self.settings, **self.core, f"{self.name}_no_such_key": 1}
        refused = attempt(tmp_path, plugins={self.name: self.plugin, **self.others}, settings=keys)
        assert isinstance(refused.error, ConfigError)
        assert f"{self.name}_no_such_key" in str(refused.error)
        assert refused.host is None

    def test_importing_it_imports_nothing_heavy(self) -> None:
        package = self.plugin.__module__.partition(".")[0]
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; import {package}; "
            f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [], "import it inside the hook that needs it"

    # --- what it does in a run ----------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Clips, cache and outputs of all runs of the class."""
        return tmp_path_factory.mktemp("contract")

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, folder: Path) -> dict[str, Any]:
        """All keys of the plugin's run."""
        return {"max_train_steps": STEPS, **cls.core, **cls.settings, **cls.world(folder)}

    @pytest.fixture(scope="class")
    @classmethod
    def recorder(cls) -> HookRecorder:
        """The calls of the uninterrupted run."""
        return HookRecorder()

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, folder: Path, keys: dict[str, Any], recorder: HookRecorder) -> Finished:
        """An uninterrupted run."""
        return cls.run(folder, keys, "through", recorder=recorder)

    @classmethod
    def run(cls, folder: Path, keys: Mapping[str, Any], output: str, **more: Any) -> Finished:
        """Run the plugin with those it needs."""
        plugins = {cls.name: cls.plugin, **cls.others}
        return train(folder, plugins=plugins, settings=keys, output=output, **more)

    def test_it_trains(self, finished: Finished) -> None:
        # Terms are checked by the loop: (B,) float32, named after the plugin.
        assert len(finished.steps) == STEPS
        assert len({event["loss"] for event in finished.steps}) > 1
        assert finished.weights()

    def test_no_part_of_it_fails_in_silence(self, finished: Finished) -> None:
        said = [line for line in finished.said if f"tracker {self.name} failed" in line]
        assert said == []

    def test_two_runs_are_equal_bit_for_bit(
        self, folder: Path, keys: dict[str, Any], finished: Finished
    ) -> None:
        self.assert_equal(self.run(folder, keys, "again"), finished)

    def test_an_interrupted_run_ends_with_the_same_bits(
        self, folder: Path, keys: dict[str, Any], finished: Finished
    ) -> None:
        with pytest.raises(Interrupted):
            self.run(folder, keys, "interrupted", crash_at=MIDDLE + 1)
        resumed = self.run(folder, keys, "interrupted")
        assert {draw.step for draw in resumed.draws} == set(range(MIDDLE + 1, STEPS + 1))
        self.assert_equal(resumed, finished)

    def test_without_it_every_other_draw_stays(
        self, folder: Path, keys: dict[str, Any], finished: Finished
    ) -> None:
        if self.core_without is None or "model" in self.info.provides:
            pytest.skip("no run of it can do without it")
        keys = {**keys, **self.core_without}
        plugins = {self.name: self.plugin, **self.others}
        named = [name for name in self.others if self.name not in _needs(self.others[name])]
        without = train(folder, plugins=plugins, named=named, settings=keys, output="without")
        assert self.name not in (without.host.plugins if without.host else {})
        assert without.draws == finished.draws

    def test_it_draws_nothing_from_global_generators(
        self, finished: Finished, recorder: HookRecorder
    ) -> None:
        mine = recorder.of(self.name)
        if not mine:
            pytest.skip("it has no hook that is called in a step")
        assert [str(call) for call in mine if call.drew] == [], "use run.generator"

    def test_samples_change_nothing_in_training(
        self, folder: Path, keys: dict[str, Any], finished: Finished
    ) -> None:
        if not hasattr(self.plugin, "validate"):
            pytest.skip("it renders no samples")
        samples = {
            "validation_prompt": "a red circle",
            "validation_step_interval": 2,
            "validation_num_inference_steps": 2,
            "validation_num_video_frames": 5,
            "validation_resolution": "32x32",
        }
        rendered = self.run(folder, {**keys, **samples}, "rendered")
        made = [event for event in rendered.events if event["kind"] == "validation"]
        assert [event["step"] for event in made] == [0, 2, 4]
        assert rendered.steps == finished.steps
        assert rendered.draws == finished.draws
        assert rendered.weights() == finished.weights()

    def test_its_state_comes_back(
        self, folder: Path, keys: dict[str, Any], finished: Finished
    ) -> None:
        if not hasattr(self.plugin, "state_dict"):
            pytest.skip("it has no state")
        state = finished.plugin(self.name).state_dict()
        restored = self.run(folder, keys, "through").plugin(self.name).state_dict()
        assert same(restored, state)

    def test_a_model_that_lacks_what_it_needs_is_refused(
        self, folder: Path, keys: dict[str, Any]
    ) -> None:
        needs = [need for need in self.info.requires if isinstance(need, type)]
        if not needs:
            pytest.skip("it needs no capability of the model")
        from trainer_core.testing.tiny import Bare

        plugins = {self.name: self.plugin, **self.others, "tiny": Bare}
        refused = attempt(folder, plugins=plugins, settings=keys, output="refused")
        assert isinstance(refused.error, (ConfigError, PluginError)), refused.error
        assert self.name in str(refused.error)
        assert needs[0].__name__ in str(refused.error)

    @staticmethod
    def assert_equal(found: Finished, wanted: Finished) -> None:
        """Fail unless two runs left the same events and the same weights, bit for bit."""
        assert found.events == wanted.events
        assert found.weights() == wanted.weights()


def _needs(plugin: type) -> tuple[Any, ...]:
    info = getattr(plugin, "info", None)
    return info.requires if isinstance(info, PluginInfo) else ()


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal: nested mappings and sequences of tensors and JSON."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
