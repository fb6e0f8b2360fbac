from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import pytest

from trainer_core import PluginInfo, PluginSettings, hookimpl, key
from trainer_core.catalogue import Catalogue
from trainer_core.errors import ConfigError
from trainer_core.settings.load import Resolved, resolve


@runtime_checkable
class HasBlocks(Protocol):
    blocks: int


def plugin(**info: Any) -> type:
    return type("Plugin", (), {"info": PluginInfo(**info), "__init__": lambda self, settings: None})


class TreadSettings(PluginSettings):
    tread_config: dict[str, Any] = key(about="Routes.")


class CrepaSettings(PluginSettings):
    crepa_enabled: bool = key(False, "Switch.")
    crepa_weight: float = key(0.5, "Weight.", ge=0)


WAN = {
    "wan": plugin(
        provides=("model",), values=("model_family=wan",), requires=("umt5",), exposes=(HasBlocks,)
    ),
    "umt5": plugin(provides=("umt5",)),
    "lora": plugin(provides=("adapter",), values=("lora_type=standard",)),
}
MORE = {
    **WAN,
    "tread": plugin(settings=TreadSettings, switch="tread_config", requires=(HasBlocks,)),
    "crepa": plugin(settings=CrepaSettings, switch="crepa_enabled"),
    "lycoris": plugin(provides=("adapter",), values=("lora_type=lycoris",)),
    "tensorboard": plugin(values=("report_to=tensorboard",)),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def call(*args: str, plugins: dict[str, type] = MORE, **more: Any) -> Resolved:
        from pathlib import Path

        return resolve(
            Path("c.json"), args=args, environ={}, catalogue=Catalogue.of(plugins), **more
        )

    return call


def refusal(run, *args, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*args, **more)
    return str(caught.value)


def test_the_settings_name_providers_and_providers_pull_what_they_require(run):
    resolved = run("--model_family", "wan")
    assert {choice.name: choice.why for choice in resolved.choices} == {
        "wan": "model_family is wan",
        "lora": "lora_type is standard",
        "umt5": "required by wan",
    }


def test_full_training_takes_no_adapter(run):
    resolved = run("--model_family", "wan", "--model_type", "full")
    assert [choice.name for choice in resolved.choices] == ["wan", "umt5"]


def test_without_a_list_switch_keys_choose(run):
    resolved = run("--model_family=wan", "--crepa_enabled", "--tread_config", '{"routes": []}')
    assert {"crepa", "tread"} <= set(resolved.plugins)
    resolved = run("--model_family=wan", "--crepa_enabled", "false")
    assert "crepa" not in resolved.plugins
    assert resolved.unused == ()


def test_with_a_list_switch_keys_choose_nothing_and_are_reported(run):
    resolved = run("--plugins", "wan", "--tread_config", '{"routes": []}')
    assert "tread" not in resolved.plugins
    assert resolved.unused == ("tread_config has no effect: tread is not in --plugins",)


def test_naming_a_plugin_switches_it_on(run):
    resolved = run("--plugins", "wan,crepa,tensorboard")
    assert resolved.plugins["crepa"].crepa_enabled is True
    assert resolved.core.report_to == ("tensorboard",)
    assert resolved.core.model_family == "wan"
    assert resolved.origins["crepa_enabled"] == "plugins (crepa)"


def test_naming_an_adapter_replaces_the_default_one_and_clashes_with_an_explicit_one(run):
    assert "lora" not in run("--plugins", "wan,lycoris").plugins
    text = refusal(run, "--plugins", "wan,lycoris", "--lora_type", "standard")
    assert "'lycoris' is named, but lora_type is standard" in text


def test_an_explicit_false_beside_the_name_is_an_error(run):
    text = refusal(run, "--plugins", "wan,crepa", "--crepa_enabled", "false")
    assert "crepa_enabled" in text
    assert "switches off 'crepa'" in text


def test_a_named_tracker_beside_report_to_none_is_an_error(run):
    text = refusal(run, "--plugins", "wan,tensorboard", "--report_to", "none")
    assert "'tensorboard' is named, but report_to is none" in text


def test_a_required_key_is_asked_for(run):
    text = refusal(run, "--plugins", "wan,tread")
    assert "tread_config: is required by the plugin tread" in text


def test_unknown_names_get_a_near_one_and_the_list(run):
    text = refusal(run, "--plugins", "wan,terad")
    assert "no plugin is called 'terad'; did you mean 'tread'?" in text
    assert "Installed: crepa, lora" in text


def test_a_value_without_provider_names_those_that_have_one(run):
    assert "Possible here: wan." in refusal(run, "--model_family", "ltx")
    text = refusal(run, "--model_family", "wan", "--optimizer", "prodigy", pending={})
    assert "no installed plugin provides this value" in text
    assert "adamw_bf16" in text


def test_a_pending_value_is_refused_with_its_sentence_unless_it_has_a_provider(run):
    pending = {"lora_type=lycoris": "is not built yet."}
    args = ("--model_family", "wan", "--lora_type", "lycoris")
    assert "is not built yet." in refusal(run, *args, plugins=WAN, pending=pending)
    assert "lycoris" in run(*args, pending=pending).plugins


def test_a_run_needs_a_model(run):
    assert "Set model_family (wan)." in refusal(run)


def test_exclusive_roles_name_both_and_why(run):
    two = {**WAN, "ltx": plugin(provides=("model",), values=("model_family=ltx",))}
    text = refusal(run, "--plugins", "wan,ltx", "--model_family=wan", plugins=two)
    assert "'ltx' is named, but model_family is wan" in text
    assert "'wan' (named in --plugins) and 'ltx' (named in --plugins) both provide" in text


def test_conflicts_hold_in_both_directions(run):
    for names in ("a,b", "b,a"):
        both = {**WAN, "a": plugin(conflicts=("b",)), "b": plugin()}
        assert "cannot share a run" in refusal(run, "--plugins", f"wan,{names}", plugins=both)


def test_requires_of_a_role_takes_its_only_provider_and_asks_between_two(run):
    base = {**WAN, "a": plugin(requires=("teacher",)), "dino": plugin(provides=("teacher",))}
    assert "dino" in run("--plugins", "wan,a", plugins=base).plugins
    two = {**base, "clip": plugin(provides=("teacher",))}
    text = refusal(run, "--plugins", "wan,a", plugins=two)
    assert "requires 'teacher', which clip, dino provide" in text
    assert "clip" not in run("--plugins", "wan,a,dino", plugins=two).plugins
    none = {**WAN, "a": plugin(requires=("teacher",))}
    assert "no installed plugin has that name" in refusal(run, "--plugins", "wan,a", plugins=none)


def test_cycles_are_named(run):
    ring = {**WAN, "a": plugin(requires=("b",)), "b": plugin(requires=("a",))}
    assert "circle: a → b → a" in refusal(run, "--plugins", "wan,a", plugins=ring)
    ring = {**WAN, "a": plugin(after=("b",)), "b": plugin(after=("a",))}
    assert "a → b → a" in refusal(run, "--plugins", "wan,a,b", plugins=ring)


def test_a_capability_that_the_model_lacks_is_refused_before_loading(run):
    bare = {**MORE, "wan": plugin(provides=("model",), values=("model_family=wan",))}
    text = refusal(run, "--plugins", "wan,tread", "--tread_config", "{}", plugins=bare)
    assert "'tread' requires a model with HasBlocks, which 'wan' does not have" in text


def test_after_orders_the_plugins_whatever_the_order_of_the_list(run):
    some = {**WAN, "a": plugin(after=("quantiser",)), "q": plugin(provides=("quantiser",))}
    assert list(run("--plugins", "a,q,wan", plugins=some).plugins)[:3] == ["q", "a", "wan"]


def test_two_owners_of_a_key_in_one_run_are_refused(run):
    class Mine(PluginSettings):
        tread_config: dict[str, Any] | None = key(None, "Also mine.")

    two = {**MORE, "tread-config": plugin(settings=Mine)}
    text = refusal(run, "--plugins", "wan,tread,tread-config", "--tread_config={}", plugins=two)
    assert "both own this key" in text
    assert "'tread'" in text
    assert "'tread-config'" in text


def test_a_key_of_core_is_refused(run):
    class Mine(PluginSettings):
        seed: int = key(1, "Core's.")

    text = refusal(run, "--plugins", "wan,seed", plugins={**WAN, "seed": plugin(settings=Mine)})
    assert "'seed' claims this key, which is core's" in text


def test_a_broken_plugin_breaks_only_the_runs_that_name_it(run):
    class Wrong(PluginSettings):
        alpha: int = key(1, "Not named after its plugin.")

    class Typo:
        info = PluginInfo()

        @hookimpl
        def comput_loss(self, output): ...

    class Foreign:
        info = PluginInfo(api=99)

    some = {**WAN, "beta": plugin(settings=Wrong), "typo": Typo, "foreign": Foreign}
    assert "wan" in run("--plugins", "wan", plugins=some).plugins
    assert "'beta_alpha'" in refusal(run, "--plugins", "wan,beta", plugins=some)
    text = refusal(run, "--plugins", "wan,typo", plugins=some)
    assert "hook 'comput_loss', which does not exist; did you mean 'compute_loss'?" in text
    assert "interface 99" in refusal(run, "--plugins", "wan,foreign", plugins=some)


def test_what_a_resume_may_not_change_leaves_trackers_and_free_keys_out(run):
    resolved = run("--plugins", "wan,tensorboard")
    assert resolved.lasting_plugins() == ("wan", "lora", "umt5")
    fixed = resolved.fixed()
    assert fixed["learning_rate"] == 1e-4
    assert not {"plugins", "report_to", "max_train_steps", "output_dir"} & set(fixed)
