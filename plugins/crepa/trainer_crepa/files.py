"""Where the teacher's files lie: a folder, or a Hub repository. Only safetensors are read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_core.errors import ConfigError, ModelError, Problem

REPOSITORIES = {
    "dinov2_vits14": "facebook/dinov2-small",
    "dinov2_vitb14": "facebook/dinov2-base",
    "dinov2_vitl14": "facebook/dinov2-large",
    "dinov2_vitg14": "facebook/dinov2-giant",
}
WIDTHS = {
    "facebook/dinov2-small": 384,
    "facebook/dinov2-base": 768,
    "facebook/dinov2-large": 1024,
    "facebook/dinov2-giant": 1536,
}
KINDS = ("dinov2", "dinov2_with_registers")
PATCH = 14
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class TeacherFiles:
    """The teacher that ``crepa_encoder`` names. source: a folder or a repository."""

    name: str

    @property
    def source(self) -> str:
        """The folder or repository."""
        return REPOSITORIES.get(self.name, self.name)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine; then no Hub call is ever made."""
        return Path(self.source).expanduser().is_dir()

    def check(self) -> None:
        """Refuse a name that can be no teacher, before anything is read or fetched."""
        if not self.is_local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.source):
            raise self.refused("is neither a folder that is there nor a teacher.")

    def width(self) -> int:
        """Return the width of a feature."""
        return WIDTHS.get(self.source) or int(self.config()["hidden_size"])

    def patch(self) -> int:
        """Return the edge of a patch in pixels."""
        return PATCH if self.source in WIDTHS else int(self.config()["patch_size"])

    def config(self) -> dict[str, Any]:
        """Return the teacher's config.json; ConfigError for a model that is no DINOv2."""
        path = self._folder("config.json") / "config.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise self.refused("holds no config.json.") from None
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}. Fetch the teacher again.") from error
        if found.get("model_type") not in KINDS:
            raise self.refused(f"holds a model of type {found.get('model_type')!r}, not DINOv2.")
        return found

    def folder(self) -> Path:
        """Return the local folder with configuration and weights, fetched if they are not here."""
        self.config()
        folder = self._folder("config.json", WEIGHTS)
        if not any(folder.glob(WEIGHTS)):
            pickles = sorted(p for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
            text = "holds no safetensors."
            if pickles:
                text = f"is there only as {pickles[0].name}, a pickle, which is never loaded."
            raise self.refused(text)
        return folder

    def refused(self, text: str) -> ConfigError:
        """Return the error that names the key and the way out."""
        way_out = (
            f"Take one of {', '.join(REPOSITORIES)}, or a folder with a DINOv2 as safetensors."
        )
        return ConfigError([Problem("crepa_encoder", text, value=self.name, way_out=way_out)])

    def _folder(self, *patterns: str) -> Path:
        if self.is_local:
            return Path(self.source).expanduser()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(self.source, allow_patterns=list(patterns)))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self.refused(f"could not be read as a Hub repository: {reason}") from error
