"""The plugin's keys. None of them changes what a step computes."""

from __future__ import annotations

from typing import Literal

from trainer_core.settings.keys import PluginSettings, key


class GroupOffloadSettings(PluginSettings):
    """What is moved, when, and where it lies otherwise."""

    enable_group_offload: bool = key(
        False,
        "Keep the blocks' frozen weights in host memory and bring them to the accelerator when they "
        "compute. Acts on CUDA.",
        menu="Training → Memory Optimisation",
        free=True,
    )
    group_offload_type: Literal["block_level", "leaf_level"] = key(
        "block_level",
        "What comes at once: whole blocks, ahead of their use; or layer by layer, which takes less "
        "memory and waits for every copy.",
        free=True,
    )
    group_offload_blocks_per_group: int = key(
        1, "Blocks that are moved together, with block_level.", unit="blocks", free=True, ge=1
    )
    group_offload_use_stream: bool = key(
        False,
        "With block_level: copy the next group while this one computes; two groups are on the "
        "accelerator instead of one.",
        free=True,
    )
    group_offload_to_disk_path: str | None = key(
        None,
        "Folder for the weights, instead of host memory: each group is read from a file when it is "
        "due.",
        free=True,
    )
