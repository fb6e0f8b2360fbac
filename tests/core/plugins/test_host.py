from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from typing import Any

import pluggy
import pytest

from trainer_core import PluginError, PluginInfo, PluginSettings, hookimpl, hookspecs, key
from trainer_core.blame import add_note, blame, notes
from trainer_core.catalogue import hook_names, implementations
from trainer_core.hooks import Hooks
from trainer_core.plugins import Host


class Named:
    info = PluginInfo()

    def __init__(self, name: str) -> None:
        self.name = name


class Loader(Named):
    @hookimpl
    def load_model(self, run):
        return [self.name]


class Wrapper(Named):
    @hookimpl(wrapper=True)
    def load_model(self):
        return [*(yield), self.name]


class Chain(Named):
    @hookimpl
    def prepare_inputs(self, inputs):
        return [*inputs, self.name]


class Optimizer(Named):
    @hookimpl
    def build_optimizer(self, run):
        return self.name


def host(*plugins: Any, builtins: Sequence[Any] = ()) -> Host:
    return Host({plugin.name: plugin for plugin in plugins}, builtins=builtins)


def test_the_last_wrapper_of_the_order_is_the_outermost():
    made = host(Loader("model"), Wrapper("quantiser"), Wrapper("adapter"))
    assert made.hooks.load_model(run=None) == ["model", "quantiser", "adapter"]


def test_calls_come_in_order_with_names_and_hand_on_what_is_asked_for():
    made = host(Chain("a"), Chain("b"), builtins=[Chain("own")])
    value: list[str] = []
    for name, call in made.calls("prepare_inputs"):
        value = call(run=None, inputs=value)
        assert value[-1] == name
    assert value == ["own", "a", "b"]
    assert made.calls("track") == ()


def test_first_results_ask_plugins_before_core():
    assert host(builtins=[Optimizer("own")]).hooks.build_optimizer(run=None, groups=[]) == "own"
    made = host(Optimizer("a"), builtins=[Optimizer("own")])
    assert made.hooks.build_optimizer(run=None, groups=[]) == "a"
    assert list(made.plugins) == ["a"]


def test_core_and_a_plugin_cannot_share_a_name():
    with pytest.raises(PluginError, match="two plugins of the run are called 'flow'"):
        host(Chain("flow"), builtins=[Chain("flow")])


def marked(name: str, marker: Any = hookimpl, body: Any = None) -> type:
    def method(self): ...

    function = marker(body or method)
    return type("Plugin", (), {"info": PluginInfo(), name: function})


def generator():
    def wrapper(self):
        yield

    return wrapper


def asks(self, weight): ...


@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        (marked("compute_los"), "did you mean 'compute_loss'"),
        (marked("compute_loss", lambda f: f), "lacks @hookimpl"),
        (marked("go", pluggy.HookimplMarker("pytest")), "marker of the project 'pytest'"),
        (marked("track", hookimpl(wrapper=True), generator()), "wraps the hook 'track'"),
        (marked("validate", hookimpl(wrapper=True)), "has no yield"),
        (marked("validate", hookimpl(tryfirst=True)), "PluginInfo.after"),
        (marked("validate", hookimpl(hookwrapper=True), generator()), "wrapper=True"),
        (marked("compute_loss", hookimpl, asks), "asks for 'weight'"),
        (marked("nothing", hookimpl(optionalhook=True)), "does not exist"),
    ],
)
def test_broken_implementations_are_refused(plugin, text):
    with pytest.raises(PluginError, match=text):
        implementations(plugin)
    with pytest.raises(PluginError, match="the plugin 'x' cannot be used"):
        Host({"x": plugin()})


def test_a_hook_may_be_implemented_under_another_method_name():
    found = implementations(marked("say_it", hookimpl(specname="track")))
    assert [(each.method, each.hook) for each in found] == [("say_it", "track")]


def test_the_protocol_equals_the_specs():
    assert {name for name in vars(Hooks) if not name.startswith("_")} == hook_names()
    for name in hook_names():
        spec = inspect.signature(getattr(hookspecs, name)).parameters
        typed = inspect.signature(getattr(Hooks, name)).parameters
        assert list(typed)[1:] == list(spec)
        assert [p.annotation for p in typed.values()][1:] == [p.annotation for p in spec.values()]
        first = getattr(hookspecs, name).trainer_spec["firstresult"]
        returned = inspect.signature(getattr(Hooks, name)).return_annotation
        assert returned.startswith("list[") != bool(first)


class BlamedSettings(PluginSettings):
    blamed_weight: float = key(1.0, "Weight.")
    blamed_token: str = key("", "Secret.", secret=True)


class Blamed(Named):
    @hookimpl
    def compute_loss(self, output):
        return helper(output)


def helper(output):
    raise ZeroDivisionError(output)


def test_an_error_names_plugin_hook_and_keys_but_no_secret():
    settings = BlamedSettings(blamed_weight=2.0, blamed_token="hunter2")
    made = Host({"blamed": Blamed("blamed")}, settings={"blamed": settings})
    (_, call), *_ = made.calls("compute_loss")
    with pytest.raises(ZeroDivisionError) as caught, blame(made):
        call(run=None, batch=None, output="x")
    assert notes(caught.value) == [
        "in plugin 'blamed', hook compute_loss (its keys: blamed_weight = 2.0, blamed_token = ***)"
    ]


class Raises(Named):
    @hookimpl
    def load_model(self, run):
        raise ValueError("inner")


def test_the_inner_plugin_is_blamed_not_its_wrapper():
    made = host(Raises("inner"), Wrapper("outer"))
    with pytest.raises(ValueError, match="inner") as caught, blame(made):
        made.hooks.load_model(run=None)
    assert notes(caught.value) == ["in plugin 'inner', hook load_model"]


def test_an_error_of_core_gets_no_note():
    with pytest.raises(KeyError) as caught, blame(host(Loader("a"))):
        {}["x"]
    assert notes(caught.value) == []


def test_nested_blocks_add_one_note():
    made = host(Raises("inner"))
    with pytest.raises(ValueError, match="inner") as caught, blame(made), blame(made):
        made.hooks.load_model(run=None)
    assert len(notes(caught.value)) == 1
    add_note(caught.value, "more")
    assert "more" in "".join(traceback.format_exception(caught.value))
