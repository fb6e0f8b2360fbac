"""Networks without contents: shapes, dtypes and devices are real, no byte of weights is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

Network = TypeVar("Network", bound=nn.Module)


class Sketch:
    """Stands at ``run.sketch`` while a run is planned.

    A plugin whose ``load_model`` or ``Encoder.sketch`` finds it there builds its network with
    :meth:`network` and reads no weights. Inside :meth:`at_work` every tensor that is made has no
    contents, so nothing there may depend on a value.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Make tensors without contents, and let ``module.to`` replace parameters by such ones."""
        original = nn.Module._apply
        nn.Module._apply = _apply  # type: ignore[method-assign]  # see _apply
        try:
            with self._mode:
                yield
        finally:
            nn.Module._apply = original  # type: ignore[method-assign]

    def network(
        self, make: Callable[[], Network], *, dtype: torch.dtype, keep: Sequence[str] = ()
    ) -> Network:
        """Return what ``make`` builds, in ``dtype``, frozen, mode eval.

        keep: parts of names whose parameters stay in float32, as diffusers'
        ``_keep_in_fp32_modules``.
        """
        with self.at_work():
            built, made = make(), dict[int, nn.Parameter]()
            for module_name, module in built.named_modules():
                for name, value in list(module._parameters.items()):
                    full = f"{module_name}.{name}".split(".")
                    stays = any(part in full for part in keep)
                    if value is None or stays or not value.is_floating_point():
                        continue
                    if id(value) not in made:  # weights that two layers share stay shared
                        made[id(value)] = nn.Parameter(value.detach().to(dtype))
                    module._parameters[name] = made[id(value)]
        return built.eval().requires_grad_(False)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor without contents."""
        with self._mode:
            return torch.empty(tuple(shape), dtype=dtype, device=device)

    def of(self, value: Tensor) -> Tensor:
        """Return a tensor without contents in the shape of a real one."""
        return self._mode.from_tensor(value)


@contextmanager
def real() -> Iterator[None]:
    """Make real tensors again for a while."""
    with unset_fake_temporarily():
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Do what ``nn.Module._apply`` does. Torch's own swaps tensors in place, which those without
    contents refuse.
    """
    if recurse:
        for child in module.children():
            child._apply(function)  # type: ignore[no-untyped-call]  # torch's own
    for name, value in module._parameters.items():
        if value is not None:
            made = nn.Parameter(function(value.detach()), requires_grad=value.requires_grad)
            module._parameters[name] = made
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class Moments(torch.optim.Optimizer):
    """An optimiser that changes nothing and has the state of another one, which needs real values.

    A plugin returns it where it finds ``run.sketch``. shapes: a parameter → the shape and dtype of each
    tensor that the other optimiser keeps for it.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        shapes: Callable[[Tensor], Sequence[tuple[Sequence[int], torch.dtype]]],
    ) -> None:
        super().__init__(param_groups, {})
        self._shapes = shapes

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing is computed
        """Make the state of parameters that have a gradient."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is None or self.state[parameter]:
                continue
            for number, (shape, dtype) in enumerate(self._shapes(parameter)):
                empty = torch.empty(tuple(shape), dtype=dtype, device=parameter.device)
                self.state[parameter][f"moment{number}"] = empty


class StoredIn8Bits(nn.Linear):
    """A frozen linear layer whose weight takes one byte, with a scale for each output row.

    It stands for every weight-only 8-bit storage: products see a copy in their own dtype, which lives as
    long as the product, in the backward pass once more.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        stored = torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", linear.weight.detach()[:, :1].clone())
        self.weight_only = True  # for trainer_core.linear, as layers that are stored have it

    def forward(self, input: Tensor) -> Tensor:
        """Return the product."""
        out: Tensor = _Product.apply(input, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return x @ (stored.to(scale.dtype) * scale).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stored, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ (stored.to(scale.dtype) * scale).to(grad.dtype), None, None
