"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer_core import quantising
from trainer_core.hookspecs import hookimpl
from trainer_core.types import PluginInfo
from trainer_torchao.weights import KINDS, load, quantised, version

if TYPE_CHECKING:
    from trainer_core.capabilities import Model
    from trainer_core.run import Run


class TorchAO:
    """Stores frozen weights of the blocks, and of the text encoder, in 8 bits."""

    info = PluginInfo(
        summary="Frozen weights in 8 bits through torchao: int8-torchao, fp8-torchao",
        provides=("quantiser",),
        values=(
            *(f"base_model_precision={kind}" for kind in KINDS),
            *(f"text_encoder_1_precision={kind}" for kind in KINDS),
        ),
    )

    def __init__(self, settings: Any = None) -> None:
        pass

    def check(self, run: Run) -> None:
        """Refuse what cannot be quantised; offer the text encoder what its key asks for."""
        quantising.check(run)
        load()  # before diffusers does, with all that the library has to say
        kind = run.settings.text_encoder_1_precision
        if kind in KINDS:
            identity = {"precision": kind, "library": f"torchao {version()}"}
            quantising.offer_encoder(run, partial(quantised, kind=kind), identity=identity)

    @hookimpl(wrapper=True)
    def load_model(self, run: Run) -> Generator[None, Model | None, Model | None]:
        """Quantise the blocks of the model that lies within, one after another."""
        kind = run.settings.base_model_precision
        if kind not in KINDS:
            return (yield)
        with quantising.blocks_on_the_host(run) as home:
            model = yield
        if model is not None:
            sizes = quantising.quantise_blocks(run, model, partial(quantised, kind=kind), home=home)
            run.say(f"blocks in {kind}: {sizes}")
        return model
