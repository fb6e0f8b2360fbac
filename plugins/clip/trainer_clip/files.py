"""Where the image encoder's files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer_core.errors import ModelError

DEFAULT_REPO = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
"""All image-to-video models of Wan 2.1 share its image encoder."""

MODEL, PROCESSOR = "image_encoder", "image_processor"
WAY_OUT = (
    "Set clip_pretrained_model_name_or_path to a model in diffusers layout (image_encoder/ and "
    f"image_processor/), such as {DEFAULT_REPO}."
)


@dataclass(frozen=True)
class EncoderFiles:
    """Folders of an image encoder on this machine."""

    model: Path
    processor: Path

    def parts(self) -> list[Path]:
        """Return every file that decides the encoder's output; a ModelError without weights."""
        weights = sorted(self.model.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"the image encoder in {self.model} has no safetensors. {WAY_OUT}")
        return [self.model / "config.json", *weights, self.processor / "preprocessor_config.json"]


def locate(own: str | None, pipeline: str | None) -> EncoderFiles:
    """Return the files of ``own``, else of ``pipeline`` if it has any, else of the default.

    A folder never causes a call to the hub.
    """
    if own is not None:
        found = _look(own)
        if found is None:
            raise ModelError(f"{own} holds no {MODEL}/ with {PROCESSOR}/. {WAY_OUT}")
        return found
    found = None if pipeline is None else _look(pipeline)
    if found is None:
        found = _look(DEFAULT_REPO)
    if found is None:
        raise ModelError(f"{DEFAULT_REPO} holds no {MODEL}/. {WAY_OUT}")
    return found


def described(own: str | None, pipeline: str | None) -> Path | None:
    """Return a local folder whose config.json tells the encoder's size; None without one here."""
    for name in (own, pipeline):
        folder = None if name is None else Path(name).expanduser() / MODEL
        if folder is not None and (folder / "config.json").is_file():
            return folder
    return None


def _look(name: str) -> EncoderFiles | None:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ModelError(f"the image encoder's folder {name} does not exist. {WAY_OUT}")
        folder = _snapshot(name)
    found = EncoderFiles(folder / MODEL, folder / PROCESSOR)
    needed = (found.model / "config.json", found.processor / "preprocessor_config.json")
    return found if all(path.is_file() for path in needed) else None


def _snapshot(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [f"{MODEL}/*.json", f"{MODEL}/*.safetensors", f"{PROCESSOR}/*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{repo} is no folder here and could not be read as a hub repository: {reason} Check name "
            "and connection, or set clip_pretrained_model_name_or_path to a folder."
        ) from error
