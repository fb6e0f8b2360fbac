"""LoRA (https://arxiv.org/abs/2106.09685): y = W x + alpha / r * B A x, W frozen.

Knows nothing of the trainer. peft does the layers; here is what a reproducible run adds to them: an
initialisation that never touches the global random state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "default"


@dataclass(frozen=True)
class Shape:
    """What an adapter is, apart from its weights.

    rank: r. alpha: the output is scaled by alpha / r. dropout_ratio: share of inputs zeroed in
    training. targets: ends of the names of the layers that have it.
    """

    rank: int
    alpha: float
    dropout_ratio: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of peft's ``LoraConfig``, as JSON holds them.

        Only those that describe the adapter and that every version of peft knows.
        """
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout_ratio,
            "target_modules": list(self.targets),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
        }


@dataclass(frozen=True)
class Matches:
    """Which of a model's layers a list of targets names.

    layers: full names of linear layers. unknown: targets that name nothing. unfit: target → a named
    module that is no linear layer. known: names of all linear layers.
    """

    layers: tuple[str, ...]
    unknown: tuple[str, ...]
    unfit: Mapping[str, str]
    known: tuple[str, ...]


def match(module: nn.Module, targets: Sequence[str]) -> Matches:
    """Return the layers whose full name is a target or ends with a dot and a target."""
    from torch import nn

    linear = {name: isinstance(child, nn.Linear) for name, child in module.named_modules() if name}
    layers: set[str] = set()
    unfit: dict[str, str] = {}
    unknown = []
    for target in targets:
        named = [name for name in linear if name == target or name.endswith("." + target)]
        layers.update(named)
        unfit.update((target, name) for name in named if not linear[name])
        if not named:
            unknown.append(target)
    known = tuple(name for name, fits in linear.items() if fits)
    return Matches(tuple(sorted(layers)), tuple(unknown), unfit, known)


def endings(names: Sequence[str]) -> list[str]:
    """Return targets that fit the names, those of repeated blocks first, each once.

    ``blocks.3.attn1.to_q`` gives ``attn1.to_q``, ``blocks.3.attn1.to_out.0`` ``attn1.to_out.0``; a
    name outside of a numbered list stays whole.
    """
    inside, outside = {}, {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts[:-2]) if part.isdigit()]
        if numbers:
            inside[".".join(parts[numbers[0] + 1 :])] = True
        else:
            outside[name] = True
    return [*inside, *outside]


def inject(
    module: nn.Module,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: Callable[[str], torch.Generator],
) -> None:
    """Put a trainable adapter without effect (B = 0) into every layer that ``shape`` targets.

    generator: layer name → CPU generator that A is drawn from (uniform within 1 / sqrt(inputs), as
    nn.Linear), in float32, so that every device starts with the same bits.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    # peft draws an initialisation that is thrown away; the forks keep it from the global state.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # of merging into quantised weights, which is never done
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        inject_adapter_in_model(LoraConfig(**shape.peft_config()), module, adapter_name=ADAPTER)
    for name, layer in adapted(module):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        drawn = torch.empty(a.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator(name))
        for part, value in ((a, drawn), (b, torch.zeros(b.weight.shape))):
            part.to(device=device, dtype=dtype)
            with torch.no_grad():
                part.weight.copy_(value)
            part.requires_grad_(True)
        layer.train(layer.base_layer.training)


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of every layer with an adapter, sorted by name."""
    from peft.tuners.lora import LoraLayer

    found = [(name, child) for name, child in module.named_modules() if _has(child, LoraLayer)]
    yield from sorted(found, key=lambda pair: pair[0])


def _has(child: nn.Module, kind: type) -> bool:
    return isinstance(child, kind) and ADAPTER in child.lora_A  # type: ignore[attr-defined]


def weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices by name: ``<layer>.lora_A.weight`` (r, in), ``lora_B`` (out, r)."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in adapted(module)
        for part in ("lora_A", "lora_B")
    }
