"""Which kernel computes attention: diffusers' dispatcher by name, after a look at what it can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trainer_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY = "attention_mechanism"
WAY_OUT = "Write diffusers, which is PyTorch's own kernel."


@dataclass(frozen=True)
class Kernel:
    """backend: diffusers' name. module: what must be importable. package: what to install for it."""

    backend: str
    module: str = ""
    package: str = ""
    trains: bool = True


KERNELS: Mapping[str, Kernel] = {
    "diffusers": Kernel("native"),
    "sageattention": Kernel("sage", "sageattention", "sageattention>=2.1.1", trains=False),
    "flash-attn-2": Kernel("flash", "flash_attn", "flash-attn"),
    "flash-attn-3": Kernel("_flash_3", "flash_attn_interface", "flash_attn_3 (built from source)"),
    "xformers": Kernel("xformers", "xformers", "xformers"),
    "flex": Kernel("flex"),
    "native-cudnn": Kernel("_native_cudnn"),
    "native-efficient": Kernel("_native_efficient"),
    "native-flash": Kernel("_native_flash"),
    "native-math": Kernel("_native_math"),
}


def installed(kernel: Kernel) -> bool:
    """Whether the package of a kernel is there; nothing is imported."""
    return not kernel.module or find_spec(kernel.module) is not None


def check(mechanism: str) -> str | None:
    """Refuse a training kernel whose package is missing; return a sentence to say, if any."""
    kernel = KERNELS[mechanism]
    if installed(kernel):
        return None
    if kernel.trains:
        text = f"the package {kernel.package} is not installed."
        raise ConfigError([_problem(mechanism, text, f"Install it. {WAY_OUT}")])
    return (
        f"{KEY} = {mechanism}: the package {kernel.package} is not installed, so samples are drawn with "
        "PyTorch's own attention, as in training"
    )


def _problem(mechanism: str, text: str, way_out: str = WAY_OUT) -> Problem:
    return Problem(KEY, text, value=mechanism, way_out=way_out)


def use(transformer: Any, mechanism: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Let a transformer train with a kernel; ConfigError where it cannot compute or has no backward.

    Kernels that only draw samples change nothing here.
    """
    kernel = KERNELS[mechanism]
    if mechanism == "diffusers" or not kernel.trains:
        return
    if reason := failure(
        kernel, head=transformer.config.attention_head_dim, device=device, dtype=dtype
    ):
        raise ConfigError([_problem(mechanism, f"cannot train here: {reason}.")])
    _set(transformer, kernel.backend)


@contextmanager
def sampling(
    transformer: Any, mechanism: str, *, device: torch.device, dtype: torch.dtype
) -> Iterator[str | None]:
    """Draw samples with a kernel that has no backward; yields why that is not possible, if so.

    Afterwards every layer has the kernel that it had.
    """
    kernel = KERNELS[mechanism]
    if kernel.trains or not installed(kernel):
        yield None
        return
    reason = failure(
        kernel,
        head=transformer.config.attention_head_dim,
        device=device,
        dtype=dtype,
        backward=False,
    )
    if reason is not None:
        yield (
            f"{KEY} = {mechanism} cannot compute here ({reason}); samples are drawn with PyTorch's own "
            "attention"
        )
        return
    before = [(layer, layer._attention_backend) for layer in _processors(transformer)]
    try:
        _set(transformer, kernel.backend)
        yield None
    finally:
        for layer, backend in before:
            layer._attention_backend = backend


def failure(
    kernel: Kernel, *, head: int, device: torch.device, dtype: torch.dtype, backward: bool = True
) -> str | None:
    """Return why a kernel cannot compute attention of heads of that width, None where it can.

    backward: whether gradients must come back, too, all finite and not all zero.
    """
    import torch
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, 64, 2, head, generator=generator)  # query, key, value (B, N, H, d)
    tensors = [t.to(device, dtype).requires_grad_(backward) for t in drawn]
    try:
        with torch.set_grad_enabled(backward):
            out = dispatch_attention_fn(*tensors, backend=AttentionBackendName(kernel.backend))
            if not backward:
                return None if out.isfinite().all() else "its result is not finite"
            grads = torch.autograd.grad(out.float().square().sum(), tensors)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        return first or type(error).__name__
    if not all(bool(g.isfinite().all() and g.abs().max() > 0) for g in grads):
        return "it gives no gradient"
    return None


def _processors(transformer: nn.Module) -> list[Any]:
    from diffusers.models.attention import AttentionModuleMixin

    layers = [m for m in transformer.modules() if isinstance(m, AttentionModuleMixin)]
    found: list[Any] = [layer.processor for layer in layers]
    return found


def _set(transformer: nn.Module, backend: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    for processor in _processors(transformer):
        processor._attention_backend = AttentionBackendName(backend)
