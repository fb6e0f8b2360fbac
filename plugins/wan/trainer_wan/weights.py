"""Where a model's files lie: a folder in diffusers layout, or a hub repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer_core.errors import ModelError


class Weights:
    """The files of one model. A folder never causes a call to the hub; only safetensors are read.

    source: a folder or a hub repository. Repositories are fetched component by component, when one
    is first asked for; HF_ENDPOINT and HF_HUB_OFFLINE act as huggingface_hub says.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        folder = Path(source).expanduser()
        self.is_local = folder.is_dir()
        if not self.is_local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise ModelError(
                f"pretrained_model_name_or_path = {source!r} is neither a folder that is there nor "
                "the name of a hub repository (owner/name). Correct the path."
            )
        self._folder = folder

    def index(self) -> dict[str, Any]:
        """Return model_index.json, which names the pipeline's components."""
        return self._json("model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's configuration, without its weights."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self._json(f"{component}/{name}")

    def component(self, name: str) -> Path:
        """Return the local folder of a component with its safetensors; a ModelError without any."""
        folder = self._fetch(f"{name}/*.json", f"{name}/*.safetensors") / name
        if not any(folder.glob("*.safetensors")):
            endings = ("bin", "pt", "pth", "ckpt")
            pickles = sorted(path for end in endings for path in folder.glob(f"*.{end}"))
            if pickles:
                raise ModelError(
                    f"{self.source}: {name} is there only as {pickles[0].name}, a pickle, which is "
                    "never loaded. Save it as safetensors (diffusers' save_pretrained does), or "
                    "set pretrained_model_name_or_path to another copy."
                )
            raise ModelError(
                f"{self.source}: {name}/ holds no safetensors. Set pretrained_model_name_or_path "
                "to a model in diffusers layout."
            )
        return folder

    def whole(self) -> Path:
        """Return a local folder with all components but the transformers."""
        index = self.index()
        parts = [n for n, v in index.items() if isinstance(v, list) and v[0] is not None]
        patterns = [f"{part}/*" for part in parts if not part.startswith("transformer")]
        return self._fetch(
            "model_index.json", *patterns, ignore=("*.bin", "*.pt", "*.pth", "*.ckpt")
        )

    def digest(self, component: str, *, of: Callable[[Path], str]) -> str:
        """Return one digest over the component's weight files; ``of`` digests a file."""
        files = sorted(self.component(component).glob("*.safetensors"))
        return "+".join(of(path) for path in files)

    def _json(self, name: str) -> dict[str, Any]:
        path = self._fetch(name) / name
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{self.source} holds no {name}, so it is no model in diffusers layout. Set "
                "pretrained_model_name_or_path to one."
            ) from None
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}. Fetch the model again.") from error
        return found

    def _fetch(self, *patterns: str, ignore: tuple[str, ...] = ()) -> Path:
        if self.is_local:
            return self._folder
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(
                snapshot_download(
                    self.source, allow_patterns=list(patterns), ignore_patterns=list(ignore)
                )
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"pretrained_model_name_or_path = {self.source!r} is no folder here and could not "
                f"be read as a hub repository: {reason} Check the name, the connection and "
                "HF_ENDPOINT, or name a local folder."
            ) from error
