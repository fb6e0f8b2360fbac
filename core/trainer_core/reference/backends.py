"""The page of the data backend file, from the models that validate its entries."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from trainer_core.data import entries
from trainer_core.data.entries import ImageEmbedsEntry, MediaEntry, TextEntry, VideoKeys
from trainer_core.settings import phrases
from trainer_core.settings.explain import default_text

_BOTH = {
    "id": "Name of the entry in reports, checkpoints and caches; unique in the file.",
    "type": "Where the data lies: a local folder.",
    "disabled": "Leave the entry out, as if it were not there. Also spelled `disable`.",
}

MEDIA = {
    **_BOTH,
    "dataset_type": "What the folder holds: clips, images (trained as clips of one frame), or media "
    "of either kind that are held out and only measured (`eval`).",
    "instance_data_dir": "Folder with the media, searched through its subfolders. A relative path is "
    "sought from the working directory, then from the folder of this file.",
    "metadata_backend": "Where facts about the files come from: the files themselves are probed, and "
    "what was found out is kept in `index.sqlite` below `cache_dir`, never in this folder.",
    "caption_strategy": "Where captions come from: a `.txt` beside each file, of which each line is an "
    "alternative; the file's name; one text for all (`instance_prompt`); or a table (`caption_file`). "
    "A file without a caption is left out and listed.",
    "instance_prompt": "The caption of every file, for `instanceprompt`.",
    "caption_file": "The table for `jsonl`, `csv` or `parquet`; without it `metadata.jsonl`, "
    "`captions.csv` or `captions.parquet` in the folder of the media.",
    "caption_column": "Column of that table that holds the caption.",
    "filename_column": "Column of that table that holds the file's path below the folder.",
    "cache_dir_vae": "Folder of the encoded clips; without it `vae/<id>` below `cache_dir`. `{id}`, "
    "`{output_dir}` and `{model_family}` are filled in.",
    "conditioning_image_embeds": "For models that see the first frame through an image encoder: the `id` "
    "of an entry that says where its outputs are kept. Datasets may share one.",
    "cache_dir_conditioning_image_embeds": "That folder for this dataset alone; without either key "
    "`conditioning_image_embeds/<id>` below `cache_dir`.",
    "vae_batch_size": "Clips that the VAE encodes at once; the setting of this name without it.",
    "repeats": "Passes over this dataset in an epoch beyond the first.",
    "probability": "Weight of this dataset in an epoch, relative to the others.",
    "resolution": "As the setting of this name, for this dataset.",
    "resolution_type": "As the setting of this name, for this dataset.",
    "aspect_bucket_rounding": "As the setting of this name, for this dataset.",
    "minimum_image_size": "Leave out media that are smaller, in the unit of `resolution`; 0 keeps all.",
    "maximum_image_size": "With `crop: true`: larger media are first resized to "
    "`target_downsample_size`, which then has to be there.",
    "target_downsample_size": "The size that `maximum_image_size` resizes to before the crop.",
    "crop": "Cut to a given aspect ratio. Without it the whole frame is shown: less than one "
    "alignment step is trimmed on each axis, and nothing is distorted.",
    "crop_aspect": "Aspect ratio to cut to: 1:1 (also without the key), the frame's own, one drawn "
    "from a list, or the nearest of that list.",
    "crop_aspect_buckets": "That list, as width / height; the sizes that the model was trained at "
    "without it.",
    "crop_style": "Where to cut: the middle, a place drawn once per clip and pass (also without the "
    "key), or a corner.",
    "video": "Length and position of clips, see below; not for images.",
}

VIDEO = {
    "num_frames": "Frames of every clip. A count that the model cannot take is rounded down to one "
    "that it can (4n+1 for Wan), which the report tells. Without it 5 seconds, or with "
    "`resolution_frames` what each file offers.",
    "min_frames": "Leave out files with fewer frames; `num_frames` without it, and never less.",
    "max_frames": "Leave out files with more frames.",
    "bucket_strategy": "Group clips by aspect ratio, all of one length; or by size and length, where "
    "the length follows the file.",
    "frame_interval": "With `resolution_frames`: round lengths down to a multiple of this, then to one "
    "that the model takes.",
    "frame_selection": "Which part of a file a clip shows: its beginning, a place drawn once per pass, "
    "places spread evenly over the passes, or every part in turn (each a clip of its own).",
    "framerate": "Frames per second that clips are taken at; the model's without it. `source` keeps "
    "every frame. A slower file keeps its own frames and is warned about.",
}

TEXT = {
    **_BOTH,
    "dataset_type": "Says that this entry is about encoded captions.",
    "default": "Which of several such entries is taken.",
    "cache_dir": "Folder of the encoded captions; without it `text` below `cache_dir`.",
    "write_batch_size": "As the setting of this name.",
}

EMBEDS = {
    **_BOTH,
    "dataset_type": "Says that this entry is about image embeddings.",
    "cache_dir": "Folder of the image embeddings; without it `conditioning_image_embeds/<id>` below the "
    "setting `cache_dir`.",
}

ENTRIES: tuple[tuple[str, type[BaseModel], Mapping[str, str]], ...] = (
    ("Media: `dataset_type` video, image or eval", MediaEntry, MEDIA),
    ("The object `video` of a media entry", VideoKeys, VIDEO),
    ("Encoded captions: `dataset_type` text_embeds", TextEntry, TEXT),
    (
        "Image embeddings: `dataset_type` conditioning_image_embeds",
        ImageEmbedsEntry,
        EMBEDS,
    ),
)
"""Heading, the model that validates, what its keys do."""


def described(model: type[BaseModel], notes: Mapping[str, str]) -> dict[str, str]:
    """Return key → what it does; a description in the model wins over ours."""
    return {
        name: field.description or notes.get(name, "") for name, field in model.model_fields.items()
    }


def backends_page() -> str:
    """Return ``docs/reference/data-backend.md``."""
    lines = [
        "# The data backend file",
        "",
        "Generated from the models that read it. `data_backend_config` names the file: a JSON list of",
        "entries (comments and trailing commas are allowed). A run needs one enabled entry of type",
        "video or image. `trainer data` shows what becomes of every file; a key that stands in the",
        "wrong place or is not known is an error with the way out.",
    ]
    for title, model, notes in ENTRIES:
        lines += ["", f"## {title}", "", "| key | default | allowed | what it does |"]
        lines += ["|---|---|---|---|"]
        about = described(model, notes)
        for name, field in model.model_fields.items():
            cells = (f"`{name}`", f"`{default_text(field)}`", phrases.allowed(field), about[name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Known, not built yet", "", "Refused with a sentence:", ""]
    lines += [f"- `{name}` ({belongs})" for name, belongs in sorted(entries.NOT_BUILT.items())]
    lines += [f"- `{name}` {sentence}" for name, sentence in sorted(entries.PENDING_KEYS.items())]
    lines.append("- `type` other than local, and URLs as folders")
    return "\n".join(lines) + "\n"
