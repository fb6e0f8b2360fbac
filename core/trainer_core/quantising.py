"""What plugins share that store frozen weights in fewer bits. They convert a layer; the walk is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer_core.capabilities import Blocks
from trainer_core.errors import ConfigError, PluginError, Problem
from trainer_core.run import QUANTISE_ENCODER
from trainer_core.types import EncoderQuantiser

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

    sizes = sizes or Sizes()
    for name, child in list(root.named_modules()):
        if type(child) is not nn.Linear:
            continue
        sizes.layers += 1
        sizes.before += stored_bytes(child.weight)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made = convert(child.to(dtype))
        made.requires_grad_(False).train(child.training)
        root.set_submodule(name, made)
        sizes.after += stored_bytes(made.weight)  # type: ignore[arg-type]  # of a linear layer
    return sizes


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
