"""Where the text encoder's files lie."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from trainer_core.errors import ModelError

DEFAULT_REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""All Wan 2.1 and 2.2 models share its text encoder."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WAY_OUT = (
    "Set pretrained_t5_model_name_or_path to a model in diffusers layout (text_encoder/ and "
    f"tokenizer/), such as {DEFAULT_REPO}."
)


@dataclass(frozen=True)
class EncoderFiles:
    """Folders of a text encoder on this machine."""

    model: Path
    tokenizer: Path

    def weights(self) -> list[Path]:
        """Return the safetensors files of the model; a ModelError if there are none."""
        if (self.model / SINGLE).is_file():
            return [self.model / SINGLE]
        index = self.model / INDEX
        if not index.is_file():
            raise ModelError(_no_safetensors(self.model))
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (self.model / name).is_file()]
        if missing:
            raise ModelError(
                f"the text encoder in {self.model} is incomplete: {INDEX} lists {missing[0]}, "
                "which is not there. Download the model again."
            )
        return [self.model / name for name in names]

    def parts(self) -> list[Path]:
        """Return every file that decides the encoder's output."""
        words = [self.tokenizer / name for name in TOKENIZER_FILES]
        return [self.model / "config.json", *self.weights(), *filter(Path.is_file, words)]


def locate(name: str) -> EncoderFiles:
    """Return the files of a folder, or of a hub repository after downloading what is missing.

    A folder never causes a call to the hub. Two layouts are read: a pipeline (``text_encoder/`` and
    ``tokenizer/``), or the text encoder with its tokenizer in one folder.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "~")):
            raise ModelError(f"the text encoder's folder {name} does not exist. {WAY_OUT}")
        folder = _download(name)
    found = _in_folder(folder)
    if found is None:
        raise ModelError(f"{name} holds no UMT5 text encoder. {WAY_OUT}")
    found.weights()
    if not any((found.tokenizer / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"{name} holds a text encoder but no tokenizer in {found.tokenizer}. {WAY_OUT}"
        )
    return found


def described(name: str) -> Path | None:
    """Return the folder whose config.json tells of the encoder, None for a hub repository.

    Weights need not be there.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    found = _in_folder(folder)
    if found is None:
        raise ModelError(f"{name} holds no UMT5 text encoder. {WAY_OUT}")
    return found.model


def _in_folder(folder: Path) -> EncoderFiles | None:
    if (folder / "text_encoder" / "config.json").is_file():
        _require_umt5(folder / "text_encoder")
        return EncoderFiles(folder / "text_encoder", folder / "tokenizer")
    if (folder / "config.json").is_file():
        _require_umt5(folder)
        beside = folder / "tokenizer"
        return EncoderFiles(folder, beside if beside.is_dir() else folder)
    return None


def _require_umt5(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    if kind != "umt5":
        raise ModelError(f"the model in {folder} is of type {kind!r}, not 'umt5'. {WAY_OUT}")


def _no_safetensors(folder: Path) -> str:
    endings = ("bin", "pt", "pth", "ckpt")
    pickles = sorted(path for end in endings for path in folder.glob(f"*.{end}"))
    if pickles:
        return (
            f"the text encoder in {folder} is there only as {pickles[0].name}, a pickle, which is "
            "never loaded. Save it as safetensors (transformers' save_pretrained does), or set "
            f"pretrained_t5_model_name_or_path to {DEFAULT_REPO}."
        )
    return f"the text encoder in {folder} has no {SINGLE} and no {INDEX}. {WAY_OUT}"


def _download(repo: str) -> Path:
    """Return the local snapshot of a repository, with its text encoder and tokenizer alone."""
    folder = _snapshot(repo, ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"])
    if _in_folder(folder) is not None:
        return folder
    # The other layout is asked for in two steps: a repository of another kind may hold large files.
    folder = _snapshot(repo, ["config.json"])
    if _in_folder(folder) is None:
        return folder
    return _snapshot(repo, ["*.safetensors", INDEX, "tokenizer/*", *TOKENIZER_FILES])


def _snapshot(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{repo} is no folder here and could not be read as a hub repository: {reason} "
            "Check name and connection, or set pretrained_t5_model_name_or_path to a folder."
        ) from error
