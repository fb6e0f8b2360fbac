"""Groups of weights that come and go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer_group_offload.tensors import leaves, mapped, rebuilt, storage_of
from trainer_group_offload.transfers import Transfers


@dataclass
class Slot:
    """A frozen parameter of a module: where a weight belongs."""

    module: nn.Module
    name: str

    @property
    def weight(self) -> Tensor:
        """What lies there now."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found

    def put(self, weight: Tensor) -> None:
        """Put a weight there, without a gradient."""
        self.module._parameters[self.name] = nn.Parameter(weight, requires_grad=False)


def frozen(modules: Iterable[nn.Module]) -> list[Slot]:
    """Return the slots of all parameters that are not trained, of these modules alone."""
    return [
        Slot(module, name)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


@dataclass
class Group:
    """Weights that are on the device together, or not at all.

    From its making on they lie at home. file: where home is a file, which then holds the leaves.
    """

    slots: Sequence[Slot]
    transfers: Transfers
    file: Path | None = None
    _pattern: list[Tensor] = field(default_factory=list)
    _homes: list[Tensor] = field(default_factory=list)
    _copies: list[Tensor] = field(default_factory=list)
    _ticket: Any = None
    _here: bool = False
    _index: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Move all weights home."""
        homes = []
        for slot in self.slots:
            weight = slot.weight.detach()
            here = leaves(weight)
            homes += here if self.file else [self.transfers.home(leaf) for leaf in here]
            # of the weight itself only its make is kept; its memory is free from here on
            self._pattern.append(mapped(weight, lambda leaf: leaf.to("meta")))
        if self.file is not None:
            _write(self.file, homes)
            homes = [leaf.to("meta") for leaf in homes]
        self._homes = homes
        self._put(homes, away=True)

    @property
    def is_here(self) -> bool:
        """Whether its weights are on the device, or on their way there."""
        return self._here

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self._homes)

    def fetch(self) -> None:
        """Start to copy the weights to the device; :meth:`wait` before they are used."""
        homes = self._homes
        if self.file is not None:
            homes = [self.transfers.home(leaf) for leaf in _read(self.file)]
        self._copies, self._ticket = self.transfers.fetch(homes)
        self._here = True
        self._put(self._copies)

    def wait(self) -> None:
        """Let what comes now see the weights."""
        if self._ticket is not None:
            self.transfers.wait(self._ticket)
            self._ticket = None

    def drop(self) -> None:
        """Give the device's memory back; the weights are at home all along."""
        self.wait()  # a copy that nobody used may still be written
        self._put(self._homes, away=True)
        self.transfers.drop(self._copies)
        self._copies, self._index, self._here = [], {}, False

    def lay_open(self) -> None:
        """Put the weights in their places as they lie at home, for who reads them outside of a pass."""
        if not self._here:
            self._put(self._homes if self.file is None else _read(self.file))

    def close(self) -> None:
        """Undo :meth:`lay_open`."""
        if not self._here:
            self._put(self._homes, away=True)

    def _put(self, made: Sequence[Tensor], *, away: bool = False) -> None:
        rest = [self.transfers.away(leaf) if away else leaf for leaf in made]
        for slot, pattern in zip(self.slots, self._pattern, strict=True):
            count = len(leaves(pattern))
            slot.put(rebuilt(pattern, rest[:count]))
            rest = rest[count:]
        self._index = {} if away else {storage_of(leaf): i for i, leaf in enumerate(made)}

    def number(self, tensor: Tensor) -> int | None:
        """Return which copy a tensor is a view of, None if of none."""
        return self._index.get(storage_of(tensor))

    def copy(self, number: int) -> Tensor:
        """Return a copy by its number."""
        return self._copies[number]


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    from trainer_core.files import write_tensors

    write_tensors(path, {f"{i:05}": leaf for i, leaf in enumerate(tensors)})


def _read(path: Path) -> list[Tensor]:
    from trainer_core.files import read_tensors

    found = read_tensors(path)
    return [found[name] for name in sorted(found)]
