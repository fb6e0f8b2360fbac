"""What plugins share that store frozen weights in fewer bits. They convert a layer; the walk is here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from trainer_core.capabilities import Blocks
from trainer_core.errors import ConfigError, PluginError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.run import QUANTISE_ENCODER
from trainer_core.types import EncoderQuantiser, PluginInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainer_core.capabilities import Model
    from trainer_core.run import Run

Convert = Callable[["nn.Linear"], "nn.Module"]
"""Returns the layer with its weight quantised, on the device where the weight lies."""


@dataclass
class Sizes:
    """Number of layers that were quantised, and their bytes before and after."""

    layers: int = 0
    before: int = 0
    after: int = 0

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"{self.layers} layers, {self.after / mib:.1f} MiB instead of {self.before / mib:.1f}"
        )


def precisions(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return what ``PluginInfo.values`` of a quantiser says of its precisions."""
    return tuple(
        f"{key}={kind}"
        for key in ("base_model_precision", "text_encoder_1_precision")
        for kind in kinds
    )


class Quantiser:
    """Base of a plugin that stores frozen weights of the blocks, and of the text encoder, in fewer bits.

    kinds: its precisions, as settings name them; :func:`precisions` tells them to the host. library: the
    package that rounds; its version is part of what a stored encoder's cache is known by.
    """

    info: ClassVar[PluginInfo]
    kinds: ClassVar[tuple[str, ...]]
    library: ClassVar[str]

    def __init__(self, settings: Any = None) -> None:
        """A quantiser has no keys of its own: those of core choose its precisions."""

    def quantised(self, linear: nn.Linear, *, kind: str) -> nn.Module:
        """Return a layer with the weight of ``linear`` rounded to ``kind``, where it lies."""
        raise NotImplementedError

    def check(self, run: Run) -> None:
        """Refuse what cannot be quantised; offer the text encoder what its key asks for."""
        check(run)
        kind = run.settings.text_encoder_1_precision
        if kind in self.kinds:
            identity = {"precision": kind, "library": f"{self.library} {version(self.library)}"}
            offer_encoder(run, partial(self.quantised, kind=kind), identity=identity)

    @hookimpl(wrapper=True)
    def load_model(self, run: Run) -> Generator[None, Model | None, Model | None]:
        """Quantise the blocks of the model that lies within, one after another."""
        kind = run.settings.base_model_precision
        if kind not in self.kinds:
            return (yield)
        with blocks_on_the_host(run) as home:
            model = yield
        if model is not None:
            sizes = quantise_blocks(run, model, partial(self.quantised, kind=kind), home=home)
            run.say(f"blocks in {kind}: {sizes}")
        return model


def check(run: Run) -> None:
    """Refuse to quantise weights that are trained."""
    if run.settings.base_model_precision != "no_change" and run.settings.model_type != "lora":
        text = (
            f"stores frozen weights, but model_type {run.settings.model_type} trains all of them."
        )
        way_out = "Write no_change, or set model_type to lora."
        value = run.settings.base_model_precision
        raise ConfigError([Problem("base_model_precision", text, value, way_out=way_out)])


@contextmanager
def blocks_on_the_host(run: Run) -> Iterator[torch.device]:
    """Let ``load_model`` leave blocks on the CPU: they reach the accelerator quantised or not at all.

    Yields the device that they belong on afterwards: in a plan the device, whoever moves them later.
    """
    import torch

    before = run.placement
    run.placement = replace(before, blocks=torch.device("cpu"))
    try:
        yield before.blocks_device if run.sketch is None else before.device
    finally:
        run.placement = before


def quantise_blocks(run: Run, model: Model, convert: Convert, *, home: torch.device) -> Sizes:
    """Quantise every linear layer of the model's blocks, feed-forward included; leave them on ``home``.

    Layers outside of the blocks (embeddings, the head) stay as they are: they are small, and what they
    round goes into every block. Where this happens is ``quantize_via``.
    """
    import torch

    if not isinstance(model, Blocks):
        raise PluginError("base_model_precision needs a model that is a stack of blocks (Blocks)")
    at = torch.device("cpu") if run.settings.quantize_via == "cpu" else run.device
    convert = _rehearsed(run, convert)
    sizes = Sizes()
    for stack in model.stacks().values():
        for block in stack.blocks:
            block.to(at)
            quantise_linears(block, convert, dtype=run.placement.dtype, sizes=sizes)
            block.to(home)
    return sizes


def offer_encoder(run: Run, convert: Convert, *, identity: Mapping[str, Any]) -> None:
    """Let the text encoder's plugin store its weights so; for a quantiser's ``check``."""
    run.state[QUANTISE_ENCODER] = EncoderQuantiser(
        identity=identity, apply=lambda network: _quantised(run, network, convert)
    )


def _quantised(run: Run, network: nn.Module, convert: Convert) -> nn.Module:
    with run.sketch.at_work() if run.sketch is not None else nullcontext():
        sizes = quantise_linears(network, _rehearsed(run, convert), dtype=run.placement.dtype)
        run.say(f"text encoder in {run.settings.text_encoder_1_precision}: {sizes}")
        return network.to(run.device)


def _rehearsed(run: Run, convert: Convert) -> Convert:
    """Return what converts a layer: while a run is planned, a stand-in of the same size."""
    if run.sketch is None:
        return convert
    from trainer_core.planner.sketch import StoredIn8Bits

    return StoredIn8Bits


def quantise_linears(
    root: nn.Module, convert: Convert, *, dtype: torch.dtype, sizes: Sizes | None = None
) -> Sizes:
    """Replace every plain linear layer below ``root`` by what ``convert`` makes of it.

    dtype: of products, and so of scales; the weight is cast to it first. Layers of other classes, such
    as those with an adapter, are left alone. Nothing is drawn.
    """
    import torch
    from torch import nn

    from trainer_core.linear import WEIGHT_ONLY

    sizes = sizes or Sizes()
    for name, child in list(root.named_modules()):
        if type(child) is not nn.Linear:
            continue
        sizes.layers += 1
        sizes.before += stored_bytes(child.weight)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made = convert(child.to(dtype))
        made.requires_grad_(False).train(child.training)
        if _can_be_restored(made, child):
            setattr(made, WEIGHT_ONLY, True)
        root.set_submodule(name, made)
        sizes.after += stored_bytes(made.weight)  # type: ignore[arg-type]  # of a linear layer
    return sizes


def _can_be_restored(made: nn.Module, plain: nn.Linear) -> bool:
    """Whether :func:`trainer_core.linear.restored` gives the weight that the layer computes with."""
    weight: Any = made.weight
    of_tensors = bool(inner_tensors(weight)) and hasattr(weight, "dequantize")
    return of_tensors and tuple(weight.shape) == (plain.out_features, plain.in_features)


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's storage; of a tensor made of others, the sum of theirs."""
    parts = inner_tensors(tensor)
    if parts:
        return sum(stored_bytes(part) for part in parts.values())
    return tensor.numel() * tensor.element_size()


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors by name that a quantised one is made of; none for a plain tensor."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return {}
    names, _ = wrapper.__tensor_flatten__()
    return {name: getattr(wrapper, name) for name in names}
