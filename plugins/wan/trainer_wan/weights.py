"""Where a model's files lie: a folder in diffusers layout, a hub repository, a single file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_core.errors import ModelError

BASE = "pretrained_model_name_or_path"
TRANSFORMER = "pretrained_transformer_model_name_or_path"
SUBFOLDER = "pretrained_transformer_subfolder"
VAE = "pretrained_vae_model_name_or_path"
PICKLES = ("bin", "pt", "pth", "ckpt")


class Repo:
    """A folder or a hub repository. A folder never causes a call to the hub.

    Only safetensors are read. Repositories are fetched component by component, when one is first
    asked for; HF_ENDPOINT and HF_HUB_OFFLINE act as huggingface_hub says. key: the setting that named
    it, for messages.
    """

    def __init__(self, source: str, *, key: str = BASE) -> None:
        self.source, self.key = source, key
        folder = Path(source).expanduser()
        self.is_local = folder.is_dir()
        if not self.is_local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise ModelError(
                f"{key} = {source!r} is neither a folder that is there nor the name of a hub "
                "repository (owner/name). Correct the path."
            )
        self._folder = folder

    def index(self) -> dict[str, Any]:
        """Return model_index.json, which names the pipeline's components."""
        return self._json("model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's configuration, without its weights; "" is the top of the repository."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self._json(f"{component}/{name}" if component else name)

    def has(self, component: str) -> bool:
        """Return whether a component is there; fetches no more than its configuration."""
        try:
            self.config(component)
        except ModelError:
            return False
        return True

    def holds(self, component: str) -> bool:
        """Return whether a folder has the weights of a component; nothing is fetched."""
        folder = self._folder / component
        return self.is_local and any(folder.glob("*.safetensors"))

    def component(self, name: str) -> Path:
        """Return the local folder of a component with its safetensors; a ModelError without any."""
        below = f"{name}/" if name else ""
        folder = self._fetch(f"{below}*.json", f"{below}*.safetensors") / name
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(path for end in PICKLES for path in folder.glob(f"*.{end}"))
            if pickles:
                raise ModelError(
                    f"{self.source}: {name or 'the model'} is there only as {pickles[0].name}, a "
                    "pickle, which is never loaded. Save it as safetensors (diffusers' "
                    f"save_pretrained does), or set {self.key} to another copy."
                )
            raise ModelError(
                f"{self.source}: {below or 'its top'} holds no safetensors. Set {self.key} to a model "
                "in diffusers layout."
            )
        return folder

    def whole(self) -> Path:
        """Return a local folder with all components but the transformers."""
        index = self.index()
        parts = [n for n, v in index.items() if isinstance(v, list) and v[0] is not None]
        patterns = [f"{part}/*" for part in parts if not part.startswith("transformer")]
        ignore = tuple(f"*.{end}" for end in PICKLES)
        return self._fetch("model_index.json", *patterns, ignore=ignore)

    def _json(self, name: str) -> dict[str, Any]:
        path = self._fetch(name) / name
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{self.source} holds no {name}, so it is no model in diffusers layout. Set "
                f"{self.key} to one."
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
                f"{self.key} = {self.source!r} is no folder here and could not be read as a hub "
                f"repository: {reason} Check the name, the connection and HF_ENDPOINT, or name a "
                "local folder."
            ) from error


@dataclass(frozen=True)
class TransformerFiles:
    """Where the weights of one expert lie.

    config: of its config.json. place: its folder, or its single file. source: for messages. own: they
    are not the pipeline's.
    """

    role: str
    config: dict[str, Any]
    place: Path
    source: str
    own: bool = False


class Weights:
    """The files of one model, some of whose parts may come from elsewhere.

    source: the pipeline. transformer: repository, folder or .safetensors file of the trained
    transformer; subfolder: where in it, "none" for the top. vae: repository or folder of the VAE.
    """

    def __init__(
        self,
        source: str,
        *,
        transformer: str | None = None,
        subfolder: str | None = None,
        vae: str | None = None,
    ) -> None:
        self.source = source
        self.base = Repo(source)
        self.subfolder = subfolder
        self.file: Path | None = None
        self.transformer_repo: Repo | None = None
        if transformer is not None and transformer.endswith(".safetensors"):
            self.file = _existing(Path(transformer).expanduser())
        elif transformer is not None:
            self.transformer_repo = Repo(transformer, key=TRANSFORMER)
        self.vae_repo = None if vae is None else Repo(vae, key=VAE)

    @property
    def is_local(self) -> bool:
        """Whether the pipeline is a folder."""
        return self.base.is_local

    @property
    def has_own_transformer(self) -> bool:
        """Whether the trained transformer is not the pipeline's."""
        return self.file is not None or self.transformer_repo is not None

    def named(self, role: str) -> tuple[str, str]:
        """Return the setting that names an expert's weights, and its value, for messages."""
        if self.file is not None:
            return TRANSFORMER, str(self.file)
        if self.transformer_repo is not None:
            return TRANSFORMER, self.transformer_repo.source
        return BASE, self.source

    def index(self) -> dict[str, Any]:
        """Return the pipeline's model_index.json."""
        return self.base.index()

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's configuration, from where the component is taken."""
        if component == "vae":
            repo, name = self._vae()
            return repo.config(name)
        if component.startswith("transformer") and self.transformer_repo is not None:
            return self.transformer_repo.config(self._folder_of(component))
        return self.base.config(component)

    def component(self, name: str) -> Path:
        """Return the local folder of a component of the pipeline, or of the VAE that replaces it."""
        if name == "vae":
            repo, name = self._vae()
            return repo.component(name)
        return self.base.component(name)

    def transformer(self, role: str, *, own: bool = True) -> TransformerFiles:
        """Return the files of an expert; own False: those of the pipeline, whatever replaces them."""
        if own and self.file is not None:
            config = self.base.config(role)
            return TransformerFiles(role, config, self.file, str(self.file), own=True)
        if own and self.transformer_repo is not None:
            repo, name = self.transformer_repo, self._folder_of(role)
            source = f"{repo.source}/{name}" if name else repo.source
            files = repo.component(name)
            return TransformerFiles(role, repo.config(name), files, source, own=True)
        folder = self.base.component(role)
        return TransformerFiles(role, self.base.config(role), folder, f"{self.source}/{role}")

    def whole(self) -> Path:
        """Return a local folder with all components of the pipeline but the transformers."""
        return self.base.whole()

    def digest(self, component: str, *, of: Callable[[Path], str]) -> str:
        """Return one digest over the component's weight files; ``of`` digests a file."""
        files = sorted(self.component(component).glob("*.safetensors"))
        return "+".join(of(path) for path in files)

    def _folder_of(self, role: str) -> str:
        if self.subfolder is None:
            return role
        return "" if self.subfolder.lower() == "none" else self.subfolder

    def _vae(self) -> tuple[Repo, str]:
        if self.vae_repo is None:
            return self.base, "vae"
        return self.vae_repo, "vae" if self.vae_repo.has("vae") else ""


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{TRANSFORMER} = {str(path)!r}: there is no such file. Correct the path.")
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; a ModelError that names it where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(
            f"{path} is damaged or cut short: {error}. Fetch the model again."
        ) from error
