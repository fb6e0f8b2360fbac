"""What each plugin costs in a step: seconds and bytes of its own hook calls, at sampled steps only.

Counted are ``prepare_inputs``, ``compute_loss`` and the draw of a route's ids. Bytes are those of the
tensors that a call makes and hands on, and on the CPU those that its loss keeps for the backward pass;
on a GPU what the allocator held more at its peak. What a route or a tap does inside the forward, and
the backward of a loss term, are part of the whole step and not told apart. At a sampled step the host
waits for the device around each call; at all others a call costs one look at a flag.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from trainer_core.types import LossTerm, ModelInputs, Route

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HOOKS = ("prepare_inputs", "compute_loss")
UNITS = ("B", "kB", "MB", "GB")


@dataclass
class Cost:
    """Sums over the sampled steps."""

    seconds: float = 0.0
    num_bytes: int = 0


@dataclass
class Costs:
    """The costs of the plugins of a run. on: whether this step is sampled.

    peak_seen: the allocator's highest peak before it was reset for a call. step_seconds: of all sampled
    steps, num_steps of them.
    """

    on: bool = False
    by_plugin: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    peak_seen: int = 0
    step_seconds: float = 0.0
    num_steps: int = 0
    inside_the_forward: set[str] = field(default_factory=set)

    def around(self, plugin: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook's implementation, measured at sampled steps."""
        if hook not in HOOKS:
            return call

        def measured(**arguments: Any) -> Any:
            if not self.on:
                return call(**arguments)
            given = arguments.get("inputs")
            return self._measure(plugin, lambda: call(**arguments), given)

        return measured

    def route(self, route: Route) -> Route:
        """Return a route whose draw is measured at sampled steps."""
        self.inside_the_forward.add(route.plugin)

        def keep(*arguments: Any) -> Tensor:
            if not self.on:
                return route.keep(*arguments)
            drawn: Tensor = self._measure(route.plugin, lambda: route.keep(*arguments), None)
            return drawn

        return replace(route, keep=keep)

    def _measure(self, plugin: str, call: Callable[[], Any], given: ModelInputs | None) -> Any:
        import torch

        kept = _Kept()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
            self.peak_seen = max(self.peak_seen, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            answer = call()
        if cuda:
            torch.cuda.synchronize()
        cost = self.by_plugin[plugin]
        cost.seconds += time.perf_counter() - start
        if cuda:
            cost.num_bytes += max(torch.cuda.max_memory_allocated() - before, 0)
        else:
            cost.num_bytes += kept.num_bytes + sum(t.nbytes for t in _made(answer, given))
        return answer

    def step_done(self, seconds: float) -> None:
        """Take in how long a sampled step took, and stop sampling."""
        self.on = False
        self.step_seconds += seconds
        self.num_steps += 1

    def scalars(self) -> dict[str, float]:
        """Return ``cost/PLUGIN/s`` and ``cost/PLUGIN/bytes``, means over the sampled steps so far."""
        found: dict[str, float] = {}
        for plugin, cost in sorted(self.by_plugin.items()):
            found[f"cost/{plugin}/s"] = cost.seconds / max(self.num_steps, 1)
            found[f"cost/{plugin}/bytes"] = cost.num_bytes / max(self.num_steps, 1)
        return found

    def table(self) -> list[str]:
        """Return what each plugin cost, a line each; nothing where none has a part in a step."""
        if not self.by_plugin or not self.num_steps:
            return []
        whole = self.step_seconds / self.num_steps
        names = sorted(self.by_plugin)
        width = max(len(name) for name in names)
        lines = [
            f"What each plugin cost, of {1e3 * whole:.4g} ms a step ({self.num_steps} sampled):"
        ]
        for name in names:
            cost = self.by_plugin[name]
            seconds = cost.seconds / self.num_steps
            line = (
                f"  {name:{width}}  {1e3 * seconds:8.3f} ms  {seconds / whole:6.1%}  "
                f"{readable(cost.num_bytes / self.num_steps):>8}"
            )
            if name in self.inside_the_forward:
                line += "  (the draw; what it does inside the forward is in the step)"
            lines.append(line)
        return lines


class _Kept:
    """Counts the bytes that autograd keeps for the backward pass, each tensor's memory once."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self.num_bytes += tensor.nbytes
        return tensor.detach()

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def _made(answer: Any, given: ModelInputs | None) -> Iterator[torch.Tensor]:
    """Yield the tensors that an answer brings and its input did not have."""
    import torch

    if isinstance(answer, torch.Tensor):
        yield answer
    elif isinstance(answer, LossTerm):
        for value in (answer.value, *answer.metrics.values()):
            if isinstance(value, torch.Tensor):  # what is none is refused by who called the hook
                yield value
    elif isinstance(answer, ModelInputs):
        for item in fields(answer):
            now = getattr(answer, item.name)
            if isinstance(now, torch.Tensor) and now is not getattr(given, item.name, None):
                yield now
            elif isinstance(now, Mapping) and now is not getattr(given, item.name, None):
                before = getattr(given, item.name, {})
                new = (v for k, v in now.items() if before.get(k) is not v)
                yield from (value for value in new if isinstance(value, torch.Tensor))


def readable(num_bytes: float) -> str:
    """Return bytes in B, kB, MB or GB, powers of 1000, three digits."""
    index = 0
    while num_bytes >= 1000 and index < len(UNITS) - 1:
        num_bytes, index = num_bytes / 1000, index + 1
    return f"{num_bytes:.3g} {UNITS[index]}"
