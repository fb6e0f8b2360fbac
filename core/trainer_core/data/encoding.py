"""Runs one encoder over samples, and checks what comes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from trainer_core.errors import PluginError
from trainer_core.types import Encoder, EncoderSample, LoadedEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run


class EncodeHooks(Protocol):
    """The part of the hooks that caching calls."""

    def encode_batch(
        self, *, run: Run, encoder: LoadedEncoder, samples: Sequence[EncoderSample]
    ) -> Any:
        """Encode samples; see the hook of that name."""
        ...


def check_writes(encoders: Sequence[Encoder]) -> None:
    """Refuse two encoders of one name, two that write one tensor, and a run without latents."""
    names: set[str] = set()
    owners: dict[str, str] = {}
    for encoder in encoders:
        if encoder.name in names:
            raise PluginError(f"two encoders are named {encoder.name!r}; rename one of them")
        names.add(encoder.name)
        for tensor in encoder.writes:
            if tensor.name in owners:
                raise PluginError(
                    f"the encoders {owners[tensor.name]!r} and {encoder.name!r} both write "
                    f"{tensor.name!r}; only one of their plugins can be in a run"
                )
            owners[tensor.name] = encoder.name
    if "latents" not in owners:
        raise PluginError('no encoder writes "latents"; the model\'s plugin must declare one')


@contextmanager
def loaded(encoder: Encoder) -> Iterator[LoadedEncoder]:
    """Load an encoder for the block and drop it afterwards, its memory included."""
    import torch

    holder = [LoadedEncoder(encoder, encoder.load())]
    try:
        with torch.no_grad():
            yield holder[0]
    finally:
        holder.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def encode(
    run: Run, hooks: EncodeHooks, encoder: LoadedEncoder, samples: Sequence[EncoderSample],
    names: Sequence[str],
) -> list[Mapping[str, Tensor]]:  # fmt: skip
    """Return the checked outputs of an encoder, one mapping per sample.

    names: of the samples, for messages. Raises PluginError that names the encoder's plugin.
    """
    found = hooks.encode_batch(run=run, encoder=encoder, samples=samples)  # HOOK first result
    plugin = encoder.name.partition(".")[0]
    who = f"plugin {plugin}: encoder {encoder.name!r}"
    if found is None:
        raise PluginError(f"{who} got no answer from encode_batch; its owner must answer")
    results = list(found)
    if len(results) != len(samples):
        raise PluginError(f"{who} returned {len(results)} results for {len(samples)} samples")
    for result, name in zip(results, names, strict=True):
        _check(result, encoder.encoder, f"{who}, {name}")
    return results


def _check(result: Mapping[str, Tensor], encoder: Encoder, who: str) -> None:
    wanted = {tensor.name for tensor in encoder.writes}
    if set(result) != wanted:
        raise PluginError(
            f"{who}: wrote {sorted(result)}, but declared {sorted(wanted)} in its writes"
        )
    for name, value in result.items():
        if value.device.type != "cpu":
            raise PluginError(f"{who}: {name!r} lies on {value.device}; return CPU tensors")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise PluginError(f"{who}: {name!r} holds NaN or infinite values")
