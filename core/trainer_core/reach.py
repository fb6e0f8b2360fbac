"""Whether gradients reach what is trained: some kinds of quantised weights let none through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer_core.capabilities import Blocks
from trainer_core.errors import ConfigError, PluginError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer_core.training import Training

LOOKED_AT = 6
"""Weights that are looked at on either end: those of three adapters of two matrices each.

Fewer would be too few: at the start one matrix of each adapter has no gradient yet, and a query's has
none where there is a single token. More would hide a block whose last layer alone is reached, by way of
the sum around it.
"""


def backward(training: Training, loss: Tensor, share: float, *, role: str) -> None:
    """Add the gradients of ``share * loss``; after the first time for a role, note what they reached.

    That draws nothing, changes nothing and does not make the host wait.
    """
    loss.backward(torch.full_like(loss, share))  # type: ignore[no-untyped-call]  # torch's own
    if role not in training.reached:
        training.reached[role] = [
            (place, _any_gradient(weights)) for place, weights in _ends(training, role)
        ]


def check_reach(training: Training) -> None:
    """Raise where the first or the last trained weights of a role got no gradient at its first step.

    Looked at once for each role. ConfigError with a quantised base, which is the usual reason,
    PluginError without.
    """
    for role, found in training.reached.items():
        for place, arrived in found:
            if not bool(arrived):  # host sync, in the first step alone
                _refuse(training, f"{place} of {role}")
        training.reached[role] = []


def _any_gradient(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return whether any of the weights has a gradient that is not zero throughout, on the device."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    flags = [(grad != 0).any() for grad in grads]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)


def _ends(training: Training, role: str) -> list[tuple[str, Sequence[nn.Parameter]]]:
    """Return the first trained weights of the first block that has any, and the last of the last one.

    Without blocks, or with none in them: those of the role that come first and last.
    """
    model = training.run.model
    if isinstance(model, Blocks):
        inside = enumerate(model.stacks()[role].blocks)
        found = [(f"block {i}", weights) for i, block in inside if (weights := _trained(block))]
        if found:
            (first, early), (last, late) = found[0], found[-1]
            return [(first, early[:LOOKED_AT]), (last, late[-LOOKED_AT:])]
    weights = _trained(model.modules[role])
    early, late = weights[:LOOKED_AT], weights[-LOOKED_AT:]
    return [("the first weights", early), ("the last weights", late)]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _refuse(training: Training, place: str) -> None:
    precision = training.run.settings.base_model_precision
    if precision == "no_change":
        raise PluginError(
            f"no gradient reaches {place}, so it would learn nothing; a plugin of this run cuts the "
            "loss off from the model's weights"
        )
    text = f"lets no gradient through to {place}, so it would learn nothing."
    way_out = "Write no_change, or a precision that quantises weights and nothing else."
    raise ConfigError([Problem("base_model_precision", text, precision, way_out=way_out)])
