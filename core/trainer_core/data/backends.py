"""Reads the data backend file. All problems of the file are reported at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer_core.data.entries import (
    NOT_BUILT,
    PENDING_KEYS,
    ImageEmbedsEntry,
    MediaEntry,
    TextEntry,
    VideoKeys,
    is_true,
    section,
)
from trainer_core.data.overrides import overridden
from trainer_core.data.types import Dataset, MediaKind
from trainer_core.errors import ConfigError, Problem
from trainer_core.files import blocked
from trainer_core.settings import phrases
from trainer_core.settings.core import CoreSettings
from trainer_core.settings.files import read_json

E = TypeVar("E", bound=BaseModel)
KNOWN_TYPES = ("video", "image", "eval", "text_embeds", "conditioning_image_embeds")


@dataclass(frozen=True)
class Backends:
    """What the file says. datasets: enabled entries with media. text_cache: of encoded captions.
    names_embeds: image embeddings are asked for.
    """

    path: Path
    datasets: tuple[Dataset, ...]
    text_cache: Path
    write_batch_size: int
    index: Path
    notes: tuple[str, ...] = ()
    names_embeds: bool = False


def load_backends(
    path: Path, settings: CoreSettings, *, overrides: Mapping[str, Any] | None = None
) -> Backends:
    """Return the datasets of a data backend file.

    overrides: a key for all entries with media (``instance_data_dir``), or for one entry
    (``my-id.repeats``, ``my-id.video.num_frames``); they win over the file. Raises ConfigError with
    every problem of the file.
    """
    reader = _Reader(path, settings)
    entries = overridden(reader.read(), overrides or {})
    media, texts = reader.entries(entries)
    datasets = tuple(found for entry in media if (found := reader.dataset(entry)) is not None)
    text = reader.text(texts)
    if not reader.problems and not any(not dataset.held_out for dataset in datasets):
        reader.add("dataset_type", "no enabled entry of type video or image.", way_out="Add one.")
    if reader.problems:
        raise ConfigError(reader.problems)
    cache = text.cache_dir if text and text.cache_dir else str(Path(settings.cache_dir) / "text")
    return Backends(
        path=path,
        datasets=datasets,
        text_cache=Path(reader.fill_in(cache, text.id if text else "text")),
        write_batch_size=(text and text.write_batch_size) or settings.write_batch_size,
        index=Path(settings.cache_dir) / "index.sqlite",
        notes=tuple(reader.notes),
        names_embeds=bool(reader.embeds),
    )


class _Reader:
    def __init__(self, path: Path, settings: CoreSettings) -> None:
        self.path, self.settings = path, settings
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.embeds: dict[str, ImageEmbedsEntry] = {}

    def add(self, key: str, text: str, value: Any = None, way_out: str = "") -> None:
        self.problems.append(
            Problem(
                key=key, text=text, value=value, where=str(self.path), way_out=way_out,
                has_value=value is not None,
            )
        )  # fmt: skip

    def read(self) -> list[Any]:
        """Return the entries of the file as they stand there."""
        value = read_json(self.path, flag="data_backend_config")
        if not isinstance(value, list):
            raise ConfigError(
                [
                    Problem(
                        key="data_backend_config", value=str(self.path), way_out="See the docs.",
                        text="the file must hold a list of entries, [{...}, {...}].",
                    )
                ]
            )  # fmt: skip
        return value

    def entries(self, found: list[Any]) -> tuple[list[MediaEntry], list[TextEntry]]:
        """Validate each enabled entry."""
        media: list[MediaEntry] = []
        texts: list[TextEntry] = []
        seen: set[str] = set()
        for position, raw in enumerate(found):
            if not isinstance(raw, dict):
                self.add(f"entry {position + 1}", "must be an object {...}", raw)
                continue
            raw = dict(raw)
            disabled = is_true(raw.pop("disable", False)) | is_true(raw.get("disabled", False))
            if disabled:
                continue
            label = f"entry {raw['id']!r}" if raw.get("id") else f"entry {position + 1}"
            if raw.get("id") and str(raw["id"]) in seen:
                self.add(label, "two enabled entries have this id.", way_out="Rename one of them.")
            seen.add(str(raw.get("id")))
            self._entry(label, raw, media, texts)
        return media, texts

    def _entry(
        self, label: str, raw: dict[str, Any], media: list[MediaEntry], texts: list[TextEntry]
    ) -> None:
        kind, where = raw.get("dataset_type"), f"{label}: dataset_type"
        backend = raw.get("type", "local")
        if backend != "local":
            self.add(
                f"{label}: type", "not built yet: this version reads local folders only.", backend,
                "Copy the data to a folder and write local.",
            )  # fmt: skip
            return
        if kind not in KNOWN_TYPES:
            self._unknown_type(where, kind)
            return
        if kind == "text_embeds":
            if (text := self._validated(TextEntry, label, raw)) is not None:
                texts.append(text)
            return
        if kind == "conditioning_image_embeds":
            if (embeds := self._validated(ImageEmbedsEntry, label, raw)) is not None:
                self.embeds[embeds.id] = embeds
                self._writable(embeds.id, "cache_dir", embeds.cache_dir)
            return
        if (entry := self._validated(MediaEntry, label, raw)) is not None:
            media.append(entry)

    def _unknown_type(self, where: str, kind: Any) -> None:
        choices = ", ".join(KNOWN_TYPES)
        if kind is None:
            self.add(where, "is missing.", way_out=f"Write one of {choices}.")
            return
        if (belongs := NOT_BUILT.get(str(kind))) is not None:
            self.add(where, f"not built yet: it belongs to {belongs}.", kind, "Remove the entry.")
            return
        guess = difflib.get_close_matches(str(kind), KNOWN_TYPES, 1)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        self.add(where, f"must be one of {choices}.{hint}", kind)

    def _validated(self, model: type[E], label: str, raw: dict[str, Any]) -> E | None:
        for key in sorted(PENDING_KEYS.keys() & (raw.keys() | section(raw).keys())):
            self.add(
                f"{label}: {key}", PENDING_KEYS[key],
                raw.get(key, section(raw).get(key)), "Remove the key.",
            )  # fmt: skip
        self._refuse_truth(model, label, raw)
        kept = {key: value for key, value in raw.items() if key not in PENDING_KEYS}
        if isinstance(kept.get("video"), dict):
            kept["video"] = {k: v for k, v in kept["video"].items() if k not in PENDING_KEYS}
        try:
            return model.model_validate(kept)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._translate(model, label, item)
            return None

    def _refuse_truth(self, model: type[BaseModel], label: str, raw: dict[str, Any]) -> None:
        """Refuse true and false for numbers, which pydantic would take for 1 and 0."""
        for prefix, keys, owner in (("", raw, model), ("video.", section(raw), VideoKeys)):
            for name in [n for n, v in keys.items() if isinstance(v, bool)]:
                field = owner.model_fields.get(name)
                kinds = phrases.branches(field.annotation) if field else [bool]
                if field and bool not in kinds and (int in kinds or float in kinds):
                    text, way_out = phrases.wrong_value(field, keys[name])
                    self.add(f"{label}: {prefix}{name}", text, keys[name], way_out)

    def _translate(self, model: type[BaseModel], label: str, item: Any) -> None:
        path = [str(part) for part in item["loc"] if not str(part).endswith("]")]
        inner = VideoKeys if path[0] == "video" and len(path) > 1 else model
        name, kind = path[1] if inner is VideoKeys else path[0], item["type"]
        shown = f"{label}: {'video.' if inner is VideoKeys else ''}{name}"
        if kind == "extra_forbidden":
            other = MediaEntry if inner is VideoKeys else VideoKeys
            if name in other.model_fields and model is MediaEntry:
                place = "beside video" if inner is VideoKeys else "into the object video"
                self.add(shown, "stands in the wrong place.", item["input"], f"Move it {place}.")
                return
            guess = difflib.get_close_matches(name, list(inner.model_fields), 1)
            out = f"Did you mean {guess[0]!r}?" if guess else "Remove it."
            self.add(shown, "unknown key.", item["input"], out)
            return
        field, value = inner.model_fields[name], item["input"]
        if kind == "missing":
            self.add(shown, "is missing.", way_out=f"Set it to {phrases.allowed(field)}.")
        elif kind == "value_error":
            self.add(shown, phrases.sentence(item), value)
        elif all(problem.key != shown for problem in self.problems):  # a union fails once a branch
            text, way_out = phrases.wrong_value(field, value)
            self.add(shown, text, value, way_out)

    def fill_in(self, text: str, name: str) -> str:
        """Return a path with ``{id}``, ``{output_dir}`` and ``{model_family}`` filled in."""
        values = {"id": name, "output_dir": self.settings.output_dir,
                  "model_family": self.settings.model_family or "model"}  # fmt: skip
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        return text

    def locate(self, entry: MediaEntry, key: str, text: str) -> Path | None:
        """Return an existing path: seen from the working directory, then from the file."""
        import fsspec

        text = self.fill_in(text, entry.id)
        protocol, bare = fsspec.core.split_protocol(text)
        bare = str(bare)
        if protocol not in (None, "file", "local"):
            self.add(
                f"entry {entry.id!r}: {key}",
                f"not built yet: {protocol} is not read, this version reads local folders only.",
                text, "Copy the data to a folder.",
            )  # fmt: skip
            return None
        home = Path(os.path.expanduser(bare))  # leaves the name of an unknown user alone
        tried = [home, self.path.parent / bare]
        for candidate in tried:
            if os.path.exists(candidate):  # a name that is too long is no error here
                return candidate
        places = " nor ".join(str(place) for place in dict.fromkeys(tried))
        self.add(f"entry {entry.id!r}: {key}", f"there is no {places}.", text, "Correct the path.")
        return None

    def text(self, texts: list[TextEntry]) -> TextEntry | None:
        """Return the default entry for encoded captions, None without any."""
        marked = [entry for entry in texts if entry.default] or texts
        if len(marked) > 1:
            names = " and ".join(repr(entry.id) for entry in marked)
            self.add(
                "default", f"the text_embeds entries {names} compete.",
                way_out="Write default: true in exactly one of them.",
            )  # fmt: skip
        if marked:
            self._writable(marked[0].id, "cache_dir", marked[0].cache_dir)
        return marked[0] if marked else None

    def dataset(self, entry: MediaEntry) -> Dataset | None:
        """Return the entry with the defaults of the settings, None after a problem."""
        before = len(self.problems)
        folder = self.locate(entry, "instance_data_dir", entry.instance_data_dir)
        if folder is not None and not folder.is_dir():
            self.add(f"entry {entry.id!r}: instance_data_dir", "is not a folder.", str(folder))
        captions = None
        if entry.caption_file:
            captions = self.locate(entry, "caption_file", entry.caption_file)
        self._check(entry)
        self._writable(entry.id, "cache_dir_vae", entry.cache_dir_vae)
        own = entry.cache_dir_conditioning_image_embeds
        self._writable(entry.id, "cache_dir_conditioning_image_embeds", own)
        shared = entry.conditioning_image_embeds
        if shared is not None and shared not in self.embeds:
            known = ", ".join(map(repr, self.embeds)) or "none"
            self.add(
                f"entry {entry.id!r}: conditioning_image_embeds",
                f"names no enabled entry of dataset_type conditioning_image_embeds (there: {known}).",
                shared, "Add such an entry, or remove the key.",
            )  # fmt: skip
        if folder is None or len(self.problems) > before:
            return None
        return self._resolved(entry, folder, captions)

    def _writable(self, name: str, key: str, text: str | None) -> None:
        if text and (reason := blocked(Path(self.fill_in(text, name)))):
            self.add(f"entry {name!r}: {key}", reason, text, "Name another folder.")

    def _check(self, entry: MediaEntry) -> None:
        label, video = f"entry {entry.id!r}", entry.video or VideoKeys()
        if entry.dataset_type == "image" and entry.video is not None:
            self.add(f"{label}: video", "has no effect on images.", way_out="Remove it.")
        if entry.caption_strategy == "instanceprompt" and not entry.instance_prompt:
            self.add(
                f"{label}: instance_prompt", "is missing; caption_strategy instanceprompt needs it.",
                way_out="Write the caption of all files, or take another caption_strategy.",
            )  # fmt: skip
        frames, least, most = video.num_frames, video.min_frames, video.max_frames
        if frames and least is not None and least < frames:
            self.add(
                f"{label}: video.min_frames",
                f"must be at least num_frames ({frames}): a shorter clip cannot fill it.", least,
                f"Write {frames}, or remove num_frames and take bucket_strategy resolution_frames.",
            )  # fmt: skip
        if most is not None and most < max(frames or 1, least or 1):
            self.add(
                f"{label}: video.max_frames",
                f"is below num_frames or min_frames ({max(frames or 1, least or 1)}), "
                "so that no clip is left.", most, "Raise it, or remove it.",
            )  # fmt: skip
        if video.frame_interval and video.bucket_strategy != "resolution_frames":
            self.add(
                f"{label}: video.frame_interval",
                "works with bucket_strategy resolution_frames only.", video.frame_interval,
                "Remove it, or set that bucket_strategy.",
            )  # fmt: skip
        self._check_crop(entry, label)

    def _check_crop(self, entry: MediaEntry, label: str) -> None:
        maximum = entry.maximum_image_size or self.settings.maximum_image_size
        target = entry.target_downsample_size or self.settings.target_downsample_size
        if maximum and not target:
            self.add(
                f"{label}: maximum_image_size", "needs target_downsample_size.", maximum,
                "Set the size that larger media are resized to before they are cropped.",
            )  # fmt: skip
        for name in ("crop_aspect", "crop_style", "crop_aspect_buckets"):
            if not entry.crop and getattr(entry, name) is not None:
                self.add(
                    f"{label}: {name}", "has no effect with crop: false.", getattr(entry, name),
                    "Write crop: true, or remove it.",
                )  # fmt: skip
        if not entry.crop and maximum:
            self.notes.append(
                f"{entry.id}: maximum_image_size and target_downsample_size have no effect with "
                "crop: false (nothing is cropped away)"
            )

    def _resolved(self, entry: MediaEntry, folder: Path, captions: Path | None) -> Dataset:
        settings, video = self.settings, entry.video or VideoKeys()
        kinds: dict[str, frozenset[MediaKind]] = {
            "video": frozenset({"video"}),
            "image": frozenset({"image"}),
            "eval": frozenset({"video", "image"}),
        }
        cache = entry.cache_dir_vae or str(Path(settings.cache_dir) / "vae" / entry.id)
        least = entry.minimum_image_size
        return Dataset(
            id=entry.id,
            kinds=kinds[entry.dataset_type],
            held_out=entry.dataset_type == "eval",
            folder=folder.absolute(),
            cache_dir=Path(self.fill_in(cache, entry.id)),
            caption_strategy=entry.caption_strategy,
            instance_prompt=entry.instance_prompt,
            caption_file=captions,
            caption_column=entry.caption_column,
            filename_column=entry.filename_column,
            resolution=entry.resolution or settings.resolution,
            resolution_type=entry.resolution_type or settings.resolution_type,
            aspect_rounding=entry.aspect_bucket_rounding or settings.aspect_bucket_rounding,
            minimum_size=(least if least is not None else settings.minimum_image_size) or 0,
            maximum_size=entry.maximum_image_size or settings.maximum_image_size,
            downsample_size=entry.target_downsample_size or settings.target_downsample_size,
            crop=entry.crop,
            crop_aspect=entry.crop_aspect or ("square" if entry.crop else "preserve"),
            crop_aspects=entry.crop_aspect_buckets,
            crop_style=entry.crop_style or ("random" if entry.crop else "center"),
            num_frames=video.num_frames,
            min_frames=video.min_frames,
            max_frames=video.max_frames,
            bucket_strategy=video.bucket_strategy,
            frame_interval=video.frame_interval,
            frame_selection=video.frame_selection,
            framerate=video.framerate or settings.framerate,
            repeats=entry.repeats,
            probability=entry.probability,
            vae_batch_size=entry.vae_batch_size,
            embeds_dir=self._embeds_dir(entry),
        )

    def _embeds_dir(self, entry: MediaEntry) -> Path:
        """Return the dataset's own folder, else that of the entry it names, else its default."""
        shared = self.embeds.get(entry.conditioning_image_embeds or "")
        default = str(Path(self.settings.cache_dir) / "conditioning_image_embeds" / "{id}")
        own = entry.cache_dir_conditioning_image_embeds
        if own is None and shared is not None:
            return Path(self.fill_in(shared.cache_dir or default, shared.id))
        return Path(self.fill_in(own or default, entry.id))
