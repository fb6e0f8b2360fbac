"""What is recomputed in the backward instead of being kept: the checkpoint policies of a block.

Knows no model. A model whose blocks come in parts hands each of them to a :data:`Part`, and the policy
of feed-forwards finds its part by name; the policy that keeps attention finds its operators by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy as OperatorPolicy,
)
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

CheckpointPolicy = Literal["none", "full", "ffn", "keep_attention"]
"""What is recomputed in the backward pass.

none: nothing. full: each block, from its input. ffn: each block's part of that name. keep_attention: each
block but its self-attention, whose output is kept.
"""

FFN = "ffn"
"""Name of the part that the policy of the same name recomputes."""

Part = Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]
"""``part(name, compute, tokens)`` returns ``compute(tokens)``, which it may run again in the backward.

A stack that is built with the names of its parts gives ``part=`` to its call of a block, and the call
hands each part, or each share of its tokens, to it.
"""


def checkpointed(
    compute: Callable[[Tensor], Tensor], tokens: Tensor, *, keep_attention: bool = False
) -> Tensor:
    """Return ``compute(tokens)``; what it saves is computed again in the backward.

    keep_attention: the outputs of self-attention are kept, so that its product of all tokens with all
    tokens is not computed again. Recomputes stop as soon as they have given what was asked.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _operator_policy)
    out: Tensor = checkpoint(compute, tokens, **options)
    return out


def _operator_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> OperatorPolicy:
    """Keep the outputs of an attention kernel whose keys are as many as its queries."""
    name = str(operator).lower()
    if "attention" in name or "attn" in name:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)][:2]
        if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
            return OperatorPolicy.MUST_SAVE
    return OperatorPolicy.PREFER_RECOMPUTE
