"""LoKr, LoHa, LoCon and full adapters: y = W x + dW x, W frozen.

Knows nothing of a run. lycoris-lora holds the factors and makes dW of them; here is what a
reproducible run adds: a start from a seed of the layer's own, a place in the module tree, and products
that never round dW to the precision of W (the library adds both in W's dtype, then subtracts W).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer_core.changes import plain, widened
from trainer_lycoris.options import Form

CHILD = "lycoris"


class Full(nn.Module):
    """A weight change of every entry, and of the bias: algo full.

    The library's own keeps a second copy of W and adds and subtracts it in each forward.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.diff = nn.Parameter(torch.zeros(layer.out_features, layer.in_features))
        self.diff_b = None if layer.bias is None else nn.Parameter(torch.zeros(layer.out_features))


class Adapted(nn.Module):
    """A linear layer with an adapter beside it; it stands in the layer's place.

    base_layer: the frozen layer. lycoris: what is trained. form: of the adapter.
    """

    def __init__(self, base_layer: nn.Linear, lycoris: nn.Module, form: Form) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lycoris = lycoris
        self.form = form
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """W (out, in) of the frozen layer, for those who ask for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Width of the inputs."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the outputs."""
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + dW x."""
        base: Tensor = self.base_layer(x)
        if self.training and self.form.module_dropout and torch.rand(()) < self.form.module_dropout:
            return base
        if isinstance(self.lycoris, Full):
            diff, diff_b = self.lycoris.diff, self.lycoris.diff_b
            if not torch.is_autocast_enabled(x.device.type):
                diff, diff_b = diff.to(x.dtype), None if diff_b is None else diff_b.to(x.dtype)
            return base + F.linear(x, diff, diff_b)
        if not self.form.rebuilds:
            added: Tensor = self.lycoris.bypass_forward_diff(x, 1)
            return base + added.to(base.dtype)
        return base + F.linear(x, self.change().to(x.dtype))

    def change(self) -> Tensor:
        """Return dW (out, in), differentiable, in the adapter's dtype."""
        return change_of(self.lycoris, self.form, frozen(self), training=self.training)


def change_of(part: Any, form: Form, weight: Tensor, *, training: bool) -> Tensor:
    """Return dW (out, in) that an adapter makes of W: the library's product, then DoRA's lengths."""
    if isinstance(part, Full):
        return part.diff
    # get_weight has the scale already; get_diff_weight would multiply by it once more
    change = (
        part.make_weight() * part.scale if form.algo == "locon" else part.get_weight(part.shape)
    )
    if training and form.algo == "lokr" and form.rank_dropout:
        kept = torch.rand(change.shape[0], 1, device=change.device) > form.rank_dropout
        change = change * kept  # (out, 1): the library draws on the CPU whatever the device
    if not form.dora_wd:
        return change
    weight = weight.to(change.dtype)
    whole: Tensor = part.apply_weight_decompose(weight + change, 1)
    return whole - weight


def inject(
    module: nn.Module,
    forms: Mapping[str, Form],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: Callable[[str], int],
) -> None:
    """Put a trainable adapter without effect in the place of every layer that ``forms`` names.

    seed: layer name → seed of its start, so that neither order nor choice of layers changes it.
    """
    for name, form in forms.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        lycoris = _moved(build(layer, form, seed=seed(name)), dtype, device)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, Adapted(layer, lycoris, form))


def _moved(lycoris: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    lycoris.to(device)
    for parameter in lycoris.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    return lycoris


def build(layer: nn.Linear, form: Form, *, seed: int) -> nn.Module:
    """Return the adapter of a layer, on the CPU in float32, as the library starts it."""
    if form.algo == "full":
        return Full(layer)
    os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")  # the same bits on every start
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    kinds: dict[str, Any] = {"lokr": LokrModule, "loha": LohaModule, "locon": LoConModule}
    shape = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if form.dora_wd:  # only its lengths ask for W, which may be stored in 8 bits
        shape.weight = nn.Parameter(plain(layer.weight).float(), requires_grad=False)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.random.default_generator.manual_seed(seed)  # the library draws from no other
        made: Any = kinds[form.algo or ""](
            "",
            shape,
            1.0,
            form.rank,
            form.scale_alpha,
            form.dropout or 0.0,
            0.0 if form.algo == "lokr" else form.rank_dropout or 0.0,
            0.0,  # module dropout is this plugin's
            weight_decompose=bool(form.dora_wd),
            wd_on_out=form.wd_on_output is not False,
            bypass_mode=False,
            factor=-1 if form.factor is None else form.factor,
            full_matrix=bool(form.full_matrix),
            decompose_both=bool(form.decompose_both),
            unbalanced_factorization=bool(form.unbalanced_factorization),
        )
    made.org_module, made.org_forward = [layer], layer.forward
    return cast(nn.Module, made)


def adapted(module: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield (name, layer) of every layer with an adapter, sorted by name."""
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, Adapted)]
    yield from sorted(found, key=lambda pair: pair[0])


def parameters(layer: Adapted) -> dict[str, nn.Parameter]:
    """Return what is trained of a layer by the name that files have for it."""
    return dict(layer.lycoris.named_parameters())


def alpha(layer: Adapted) -> float | None:
    """Return the alpha that stands in files; None for a kind that has none."""
    if isinstance(layer.lycoris, Full):
        return None
    part: Any = layer.lycoris
    whole = layer.form.algo == "lokr" and part.use_w1 and part.use_w2  # has no scale
    return float(layer.form.rank) if whole else layer.form.scale_alpha


def frozen(layer: Adapted) -> Tensor:
    """Return W (out, in) of a layer with an adapter, as its products use it, where the adapter lies.

    W itself may lie in host memory for now.
    """
    weight = plain(layer.base_layer.weight)
    return weight.to(next(iter(parameters(layer).values())).device)


def exact_change(layer: Adapted) -> Tensor:
    """Return W' - W (out, in), made by the library of the live factors.

    In float32; with DoRA in float64, since W' and W are nearly the same.
    """
    scaled = bool(layer.form.dora_wd)
    twin = build(layer.base_layer, layer.form, seed=0).eval()
    live = parameters(layer)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            value.data = widened(live[name], scaled=scaled)
        weight = widened(frozen(layer), scaled=scaled) if scaled else frozen(layer)
        return change_of(twin, layer.form, weight, training=False).detach()
