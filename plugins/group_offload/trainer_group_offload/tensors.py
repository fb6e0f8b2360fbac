"""Weights as the plain tensors they are made of: a quantised weight is data and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def leaves(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of, itself if it is one."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return [tensor]
    names, _ = wrapper.__tensor_flatten__()
    return [leaf for name in names for leaf in leaves(getattr(wrapper, name))]


def rebuilt(tensor: Tensor, made: Sequence[Tensor]) -> Tensor:
    """Return a tensor like ``tensor`` that is made of other leaves, in the order of :func:`leaves`."""
    return _rebuilt(tensor, iter(made))


def _rebuilt(tensor: Tensor, made: Iterator[Tensor]) -> Tensor:
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return next(made)
    names, context = wrapper.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(wrapper, name), made) for name in names}
    out: Tensor = type(wrapper).__tensor_unflatten__(
        inner, context, wrapper.size(), wrapper.stride()
    )
    return out


def mapped(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor like ``tensor`` with ``function`` applied to its leaves, without a gradient."""
    with torch.no_grad():
        plain = tensor.detach()
        return rebuilt(plain, [function(leaf) for leaf in leaves(plain)])


def storage_of(tensor: Tensor) -> int:
    """Return the address of a plain tensor's memory, the same for all views of it."""
    return tensor.untyped_storage().data_ptr()
