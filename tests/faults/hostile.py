"""A plugin that implements everything and misbehaves in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from trainer_core import PluginInfo, hookimpl


class Hostile:
    """Implements every hook and method; the one called ``where`` does ``fault``, the others nothing."""

    info = PluginInfo(summary="Hostile", after=("tiny",))  # and so it is asked first
    where: ClassVar[str] = ""
    fault: ClassVar[Callable[..., Any]]

    def __init__(self, settings: Any = None) -> None:
        self.kept: list[Any] = []

    def act(self, name: str, default: Any = None, **facts: Any) -> Any:
        return type(self).fault(self, **facts) if name == self.where else default

    @hookimpl
    def describe_model(self, run):
        return self.act("describe_model", run=run)

    def encoders(self, run):
        return self.act("encoders", [], run=run)

    @hookimpl
    def encode_batch(self, run, encoder, samples):
        return self.act("encode_batch", run=run, encoder=encoder, samples=samples)

    @hookimpl
    def load_model(self, run):
        return self.act("load_model", run=run)

    def attach(self, run):
        self.act("attach", run=run)

    def parameters(self):
        return self.act("parameters", [])

    @hookimpl
    def route_tokens(self, run):
        return self.act("route_tokens", run=run)

    @hookimpl
    def offload(self, run, phase):
        return self.act(f"offload:{phase}" if f"offload:{phase}" == self.where else "offload")

    @hookimpl
    def build_optimizer(self, run, groups):
        return self.act("build_optimizer", groups=groups)

    @hookimpl
    def prepare_inputs(self, run, inputs):
        return self.act("prepare_inputs", inputs, inputs=inputs)

    @hookimpl
    def compute_loss(self, run, batch, output):
        return self.act("compute_loss", batch=batch, output=output)

    @hookimpl
    def save_weights(self, run, folder, final):
        return self.act("save_weights", folder=folder)

    @hookimpl
    def load_weights(self, run, folder):
        return self.act("load_weights")

    @hookimpl
    def validate(self, run):
        return self.act("validate", run=run)

    @hookimpl
    def track(self, run, record):
        return self.act("track", record=record)

    def state_dict(self):
        return self.act("state_dict", {})

    def load_state_dict(self, state):
        self.act("load_state_dict")


def hostile(where: str, fault: Callable[..., Any]) -> type:
    return type("Acting", (Hostile,), {"where": where, "fault": staticmethod(fault)})


def raising(plugin: Hostile, **facts: Any) -> Any:
    raise ZeroDivisionError("hostile")


def answering(value: Any) -> Callable[..., Any]:
    return lambda plugin, **facts: value
