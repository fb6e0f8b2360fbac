"""Records which hooks a run calls, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer_core.catalogue import hook_names

if TYPE_CHECKING:
    from trainer_core.plugins import Host


@dataclass(frozen=True)
class Call:
    """A call of a hook.

    plugin: whose implementation, "" where all plugins were asked in one call. detail: the phase of
    ``offload``, "final" of ``save_weights``, the kind of ``track``'s record, else "". step: the
    optimiser step at work. drew: whether it drew from torch's global generator.
    """

    hook: str
    plugin: str = ""
    detail: str = ""
    step: int = 0
    drew: bool = False

    def __str__(self) -> str:
        return f"{self.hook}:{self.detail}" if self.detail else self.hook


class HookRecorder:
    """The calls of one host in order; give it to ``harness.train(recorder=...)``."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attach(self, host: Host) -> None:
        """Record every call of the host's hooks from now on."""
        host._manager.add_hookcall_monitoring(self._before, lambda *_: None)
        for hook in sorted(hook_names()):
            host._called[hook] = tuple(
                (name, self._recording(hook, name, call)) for name, call in host.calls(hook)
            )

    def names(self, *hooks: str) -> list[str]:
        """Return ``hook`` or ``hook:detail`` of each call, of these hooks only if any are named.

        Calls of several plugins in a row count once.
        """
        found: list[str] = []
        for call in self.calls:
            is_same = bool(call.plugin) and bool(found) and found[-1] == str(call)
            if (not hooks or call.hook in hooks) and not is_same:
                found.append(str(call))
        return found

    def of(self, plugin: str) -> list[Call]:
        """Return the calls of one plugin in hooks that core calls plugin by plugin."""
        return [call for call in self.calls if call.plugin == plugin]

    def assert_order(self, expected: Sequence[str]) -> None:
        """Fail unless these calls (as :meth:`names` writes them) came in this order, others between."""
        rest = iter(self.names())
        for place, name in enumerate(expected):
            if name not in rest:  # consumes the calls up to it
                after = f" after {expected[place - 1]}" if place else ""
                raise AssertionError(f"{name} was not called{after}: {self.names()}")

    def _before(self, hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        self.calls.append(Call(hook, "", _detail(hook, arguments), _step(arguments)))

    def _recording(self, hook: str, plugin: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recording(**arguments: Any) -> Any:
            import torch

            before = torch.get_rng_state()
            result = call(**arguments)
            # track runs beside the loop, in a thread of its own
            drew = hook != "track" and not torch.equal(before, torch.get_rng_state())
            self.calls.append(Call(hook, plugin, _detail(hook, arguments), _step(arguments), drew))
            return result

        return recording


def _detail(hook: str, arguments: Mapping[str, Any]) -> str:
    if hook == "offload":
        return str(arguments["phase"] or "set-up")
    if hook == "save_weights":
        return "final" if arguments["final"] else ""
    return str(arguments["record"].kind) if hook == "track" else ""


def _step(arguments: Mapping[str, Any]) -> int:
    moment = getattr(arguments.get("run"), "moment", None)
    return moment.step if moment is not None else 0
