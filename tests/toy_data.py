"""A model that knows nothing and an encoder whose output shows which pixels it was given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer_core.data import CachedData, fill_cache, load_backends, plan_data
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import EncodedTensor, Encoder, EncoderSample, Expert, ModelSpec, Placement

SPEC = ModelSpec(
    name="toy", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),),
)  # fmt: skip
WAN = ModelSpec(
    name="wan", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),), sizes=((832, 480), (480, 832)),
)  # fmt: skip


class ToyHooks:
    """Answers encode_batch; latents are block means, captions are their characters."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.spoil: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: tensors

    def encode_batch(self, *, run: Run, encoder: Any, samples: Sequence[EncoderSample]) -> Any:
        self.calls.append((encoder.name, len(samples)))
        assert encoder.network == f"network of {encoder.name}"
        results = []
        for sample in samples:
            if sample.pixels is not None:
                pixels = sample.pixels.float() / 255
                latents = torch.nn.functional.avg_pool3d(pixels.transpose(0, 1), (1, 16, 16))
                results.append(self.spoil({"latents": latents}))
            else:
                codes = torch.tensor([float(ord(c)) for c in sample.caption or ""])
                results.append({"text": codes[:, None].repeat(1, 2)})
        return results


def encoders(*, batch_size: int = 1, version: str = "1", pad: int = 80) -> tuple[Encoder, ...]:
    def make(name: str, reads: Any, writes: EncodedTensor, size: int) -> Encoder:
        return Encoder(
            name=name, reads=reads, writes=(writes,), identity=lambda: {"version": version},
            load=lambda: f"network of {name}", batch_size=size,
        )  # fmt: skip

    return (
        make("toy.vae", "pixels", EncodedTensor("latents"), batch_size),
        make("toy.text", "caption", EncodedTensor("text", pad_to=pad), 1),
    )


class World:
    """A folder with datasets, and the stages of the data side over it."""

    def __init__(self, root: Path) -> None:
        self.root, self.hooks, self.said = root, ToyHooks(), list[str]()
        self.entries: list[dict[str, Any]] = []
        self.keys: dict[str, Any] = {
            "cache_dir": str(root / "cache"), "resolution": 64, "train_batch_size": 2,
            "caption_dropout_probability": 0.0, "max_train_steps": 10,
        }  # fmt: skip

    encoders = staticmethod(encoders)
    spec, wan = SPEC, WAN

    def folder(self, name: str = "clips") -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def add(self, name: str = "clips", *, kind: str = "video", **keys: Any) -> None:
        folder = self.folder(name)
        self.entries.append(
            {"id": name, "type": "local", "dataset_type": kind, "instance_data_dir": str(folder)}
            | keys
        )

    @property
    def settings(self) -> CoreSettings:
        return CoreSettings(**self.keys)

    def backends(self, overrides: Mapping[str, Any] | None = None) -> Any:
        path = self.root / "data.json"
        path.write_text(json.dumps(self.entries), encoding="utf-8")
        return load_backends(path, self.settings, overrides=overrides)

    def plan(self, spec: ModelSpec = SPEC, **keys: Any) -> Any:
        return plan_data(self.backends(), self.settings, spec, say=self.said.append, **keys)

    def run(self, *, rank: int = 0, world_size: int = 1) -> Run:
        place = Placement(torch.device("cpu"), torch.float32, torch.float32)
        return Run(
            self.settings, placement=place, output_dir=self.root / "out", rank=rank,
            world_size=world_size, notify=self.said.append,
        )  # fmt: skip

    def fill(self, *, spec: ModelSpec = SPEC, plan: Any = None, **keys: Any) -> CachedData:
        return fill_cache(
            plan or self.plan(spec), self.run(), encoders(**keys), self.hooks, captions=["a prompt"]
        )
