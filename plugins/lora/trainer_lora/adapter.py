"""LoRA (https://arxiv.org/abs/2106.09685): y = W x + alpha / r * B A x, W frozen.

With DoRA (https://arxiv.org/abs/2402.09353) each row of W + alpha / r * B A gets a trained length m.
Knows nothing of a run. peft does the layers; here is what a reproducible run adds to them: an
initialisation that never touches the global random state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainer_core.changes import plain, widened
from trainer_lora.shape import Shape, match

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ADAPTER = "default"
MAGNITUDE = "lora_magnitude_vector"


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

    from trainer_lora.fused import take_over

    layers = match(module, shape.targets).layers
    # peft draws an initialisation that is thrown away; the forks keep it from the global state.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # of merging into quantised weights, which is never done
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        config = LoraConfig(**shape.peft_config(layers))
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for name, layer in adapted(module):
        _set_dropout(layer, shape.of(name).dropout_ratio)
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        drawn = torch.empty(a.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator(name))
        for part, value in ((a, drawn), (b, torch.zeros(b.weight.shape))):
            part.to(device=device, dtype=dtype)
            with torch.no_grad():
                part.weight.copy_(value)
        if shape.dora:
            norm = frozen(layer).float().norm(dim=1)  # (out,): no effect yet
            layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(norm.to(device, dtype))
        for parameter in _parts(layer).values():
            parameter.requires_grad_(True)
        layer.train(layer.base_layer.training)
        take_over(layer, ADAPTER)


def _set_dropout(layer: Any, ratio: float) -> None:
    from torch import nn

    layer.lora_dropout[ADAPTER] = nn.Dropout(p=ratio) if ratio else nn.Identity()


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of every layer with an adapter, sorted by name."""
    from peft.tuners.lora import LoraLayer

    found = [(name, child) for name, child in module.named_modules() if _has(child, LoraLayer)]
    yield from sorted(found, key=lambda pair: pair[0])


def _has(child: nn.Module, kind: type) -> bool:
    return isinstance(child, kind) and ADAPTER in child.lora_A  # type: ignore[attr-defined]


def _parts(layer: Any) -> dict[str, nn.Parameter]:
    parts = {
        f"{part}.weight": getattr(layer, part)[ADAPTER].weight for part in ("lora_A", "lora_B")
    }
    if ADAPTER in layer.lora_magnitude_vector:
        parts[MAGNITUDE] = layer.lora_magnitude_vector[ADAPTER].weight
    return parts


def weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained by name: ``<layer>.lora_A.weight`` (r, in), ``lora_B.weight`` (out, r) and,
    with DoRA, ``lora_magnitude_vector`` (out,).
    """
    return {
        f"{name}.{part}": parameter
        for name, layer in adapted(module)
        for part, parameter in _parts(layer).items()
    }


def frozen(layer: Any) -> Tensor:
    """Return W (out, in) of a layer with an adapter, as its products use it, where the adapter lies.

    W itself may lie in host memory for now.
    """
    from peft.utils.integrations import dequantize_module_weight

    weight = plain(dequantize_module_weight(layer.base_layer))
    return weight.to(layer.lora_A[ADAPTER].weight.device)


def change(layer: Any) -> Tensor:
    """Return W' - W (out, in): what the adapter of a layer adds, with its live scale.

    In float32; with DoRA in float64, since W' and W are nearly the same.
    """
    import torch

    has_lengths = ADAPTER in layer.lora_magnitude_vector
    with torch.no_grad():
        a = widened(layer.lora_A[ADAPTER].weight, scaled=has_lengths)
        b = widened(layer.lora_B[ADAPTER].weight, scaled=has_lengths)
        low_rank = b @ a
        scaling = layer.scaling[ADAPTER]
        if not has_lengths:
            return scaling * low_rank
        dora = layer.lora_magnitude_vector[ADAPTER]
        weight = widened(frozen(layer), scaled=True)
        norm = dora.get_weight_norm(weight, low_rank, scaling)
        factor = (widened(dora.weight, scaled=True) / norm).view(-1, 1)
        return factor * (weight + scaling * low_rank) - weight
