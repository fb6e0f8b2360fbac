"""What the trainer sees of the plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_core.capabilities import Blocks
from trainer_core.errors import ConfigError, Problem
from trainer_core.files import blocked
from trainer_core.hookspecs import hookimpl
from trainer_core.types import Phase, PluginInfo, Residency
from trainer_group_offload.config import GroupOffloadSettings

if TYPE_CHECKING:
    from torch import nn

    from trainer_core.run import Run
    from trainer_group_offload.groups import Group
    from trainer_group_offload.transfers import Transfers

NO_CUDA = (
    "enable_group_offload needs CUDA and has no effect here: the weights stay where they are, "
    "and the run is the same without it"
)


class GroupOffload:
    """Keeps frozen blocks in host memory, or in files, and brings them when they compute."""

    info = PluginInfo(
        summary="Frozen blocks in host memory, brought to the accelerator ahead of their use",
        settings=GroupOffloadSettings,
        switch="enable_group_offload",
        requires=(Blocks,),
    )

    def __init__(self, settings: GroupOffloadSettings) -> None:
        self.settings = settings
        self._moving: list[Group] = []

    def check(self, run: Run) -> None:
        """Refuse what cannot be moved; let the model leave its blocks on the host."""
        if run.settings.model_type != "lora":
            text = f"moves frozen weights, but model_type {run.settings.model_type} trains all of them."
            way_out = "Remove it, or set model_type to lora."
            raise ConfigError([Problem("enable_group_offload", text, True, way_out=way_out)])
        folder = self.settings.group_offload_to_disk_path
        if folder is not None and (reason := blocked(Path(folder))):
            way_out = "Name another folder."
            raise ConfigError(
                [Problem("group_offload_to_disk_path", reason, folder, way_out=way_out)]
            )
        for sentence in self._idle():
            run.say(sentence)
        if not self.acts(run):
            run.say_once(NO_CUDA)
            return
        import torch

        run.placement = replace(run.placement, blocks=torch.device("cpu"))

    def acts(self, run: Run) -> bool:
        """Return whether weights can be moved here."""
        return run.device.type == "cuda"

    def transfers(self, run: Run) -> Transfers:
        """Return what copies weights to the device."""
        from trainer_group_offload.transfers import CudaTransfers

        return CudaTransfers(run.device, stream=self.settings.group_offload_use_stream)

    def resident_bytes(self, blocks: Sequence[int]) -> int:
        """Return what of blocks of so many bytes is on the accelerator at once, for ``trainer plan``.

        Layer by layer: a third of a block, the size of its largest layer or of query, key and value.
        """
        if self.settings.group_offload_type == "leaf_level":
            return max(blocks) // 3
        size = self.settings.group_offload_blocks_per_group
        groups = [sum(blocks[i : i + size]) for i in range(0, len(blocks), size)]
        at_once = 2 if self.settings.group_offload_use_stream else 1
        return sum(sorted(groups)[-at_once:])

    @hookimpl
    def offload(
        self, run: Run, phase: Phase | None
    ) -> Sequence[Residency] | AbstractContextManager[None] | None:
        """Return a residency for each role, at set-up; its blocks are at home from then on.

        While something is saved they can be read there: what an adapter does may depend on them.
        """
        if phase == "save" and self.acts(run):
            return self._open()
        if phase is not None or run.sketch is not None or not self.acts(run):
            return None  # a plan takes off what resident_bytes tells
        assert isinstance(run.model, Blocks)  # the plugin requires it
        return [
            self._residency(run, role, stack.blocks) for role, stack in run.model.stacks().items()
        ]

    @contextmanager
    def _open(self) -> Iterator[None]:
        for group in self._moving:
            group.lay_open()
        try:
            yield
        finally:
            for group in self._moving:
                group.close()

    def _residency(self, run: Run, role: str, blocks: nn.ModuleList) -> Residency:
        from trainer_group_offload.residency import BlockResidency, LeafResidency

        for buffer in blocks.buffers():
            buffer.data = buffer.data.to(run.device)
        names = (f"{role}.blocks",)
        if self.settings.group_offload_type == "leaf_level":
            groups = self._leaves(run, role, blocks)
            leaf = LeafResidency(groups, _wrappers(blocks))
            of_a_block = sum(group.nbytes for group in groups) // len(blocks)
            self._tell(run, role, groups, most=self.resident_bytes([of_a_block]))
            return Residency("group_offload", names, leaf.before, leaf.after, role=role)
        size, ahead = (
            self.settings.group_offload_blocks_per_group,
            self.settings.group_offload_use_stream,
        )
        groups = self._groups(
            run, role, [blocks[i : i + size] for i in range(0, len(blocks), size)]
        )
        mover = BlockResidency(groups, per_group=size, num_blocks=len(blocks), ahead=ahead)
        most = (2 if ahead else 1) * max(group.nbytes for group in groups)
        self._tell(run, role, groups, most=most)
        return Residency(
            "group_offload", names, mover.before, mover.after, role=role, saving=mover.saving
        )

    def _groups(self, run: Run, role: str, parts: Sequence[nn.Module]) -> list[Group]:
        from trainer_group_offload.groups import Group, frozen

        transfers, groups = self.transfers(run), []
        for number, part in enumerate(parts):
            slots = frozen(part.modules())
            groups.append(Group(slots, transfers, file=self._file(role, number)))
        self._moving += groups
        return groups

    def _leaves(self, run: Run, role: str, blocks: nn.ModuleList) -> list[Group]:
        """Return a group for each linear layer; the small weights between them stay on the device."""
        from torch import nn

        from trainer_group_offload.groups import frozen
        from trainer_group_offload.tensors import mapped

        layers = [m for m in blocks.modules() if isinstance(m, nn.Linear) and frozen([m])]
        groups, moved = self._groups(run, role, layers), set(layers)
        for slot in frozen(m for m in blocks.modules() if m not in moved):
            slot.put(mapped(slot.weight, lambda leaf: leaf.to(run.device)))
        return groups

    def _file(self, role: str, number: int) -> Path | None:
        folder = self.settings.group_offload_to_disk_path
        return None if folder is None else Path(folder) / f"{role}-{number:05}.safetensors"

    def _idle(self) -> list[str]:
        """Return a sentence for each key that was set and cannot act beside leaf_level."""
        fields = type(self.settings).model_fields
        names = ("group_offload_blocks_per_group", "group_offload_use_stream")
        if self.settings.group_offload_type != "leaf_level":
            return []
        return [
            f"{name} has no effect: it acts with group_offload_type block_level only"
            for name in names
            if getattr(self.settings, name) != fields[name].default
        ]

    def _tell(self, run: Run, role: str, groups: Sequence[Group], *, most: int) -> None:
        gib = 2**30
        total = sum(group.nbytes for group in groups) / gib
        where = self.settings.group_offload_to_disk_path or "host memory"
        run.say(
            f"group offload: {total:.2f} GiB of {role} lie in {where}, at most {most / gib:.2f} GiB "
            f"of it on the accelerator ({len(groups)} groups)"
        )


def _wrappers(blocks: nn.ModuleList) -> dict[nn.Module, nn.Module]:
    """Return layer → the adapter around it, by the name that peft gives to what lies inside."""
    found = ((getattr(outer, "base_layer", None), outer) for outer in blocks.modules())
    return {layer: outer for layer, outer in found if layer is not None}
